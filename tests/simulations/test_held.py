"""What a device keeps on disk comes back as it was."""

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from eclm_flower import receive
from eclm_flower.federation import InProcessGrid
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.messages import BATCH_NORM
from simulations.client_app import app
from simulations.held import device_folder, keep, opened
from simulations.settings import Settings
from simulations.world import World


@pytest.fixture
def sent() -> tuple[Message, World]:
    InProcessGrid(app, 1)  # messages can only be made inside a run
    world = World(Settings(devices=2, per_round=1), seed=0)
    selection = dict.fromkeys(world.model.layers, (0, 3, 7))
    cloud = CloudModel.opened(world.model, ArrayRecord(world.model.state_dict()), version=0)
    arrays, told = cloud.pack(selection)
    config = {**told, BATCH_NORM: "frozen", "x": 1.5, "y": True}
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
    return Message(content, 1, "evaluate"), world


def test_a_device_keeps_the_message_and_the_adapted_model(sent, tmp_path: Path):
    message, world = sent
    model = receive(message, world.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    keep(tmp_path, message, model)
    later = Message(RecordDict({"config": ConfigRecord({"z": 1})}), 1, "evaluate")
    original, state = opened(tmp_path, later)
    assert dict(original.content["config"]) == dict(message.content["config"])
    again = receive(original, world.model)
    assert not torch.equal(next(again.parameters()), next(model.parameters()))
    again.load_state_dict(state)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


def test_every_device_strategy_and_seed_has_a_folder_of_its_own():
    folders = {
        device_folder(Path("/out"), seed=seed, strategy=strategy, device=device)
        for seed in (0, 1)
        for strategy in ("eclm", "fedavg")
        for device in (0, 1)
    }
    assert len(folders) == 8
