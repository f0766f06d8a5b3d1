"""What a sub-model is said to cost on the wire is no less, and little more, than what is sent."""

import pytest
import torch
import torchvision
from federated import build_model, eclm_app, grid_of
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from eclm_flower import ECLM, modularize
from eclm_flower.federation import content_bytes
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.messages import BATCH_NORM
from eclm_flower.modular import slim_resnet

IMAGE = torch.zeros(1, 3, 32, 32)
MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 4)),
        IMAGE[:, 0, 0, :12],
    ),
    "slim": (slim_resnet, IMAGE),
    "deep": (lambda: torchvision.models.resnet34(num_classes=10), IMAGE),
}


@pytest.mark.parametrize("gating", ["uniform", "selector"])
@pytest.mark.parametrize("name", MODELS)
def test_a_message_never_exceeds_its_price(name, gating):
    grid_of(ClientApp())
    build, example = MODELS[name]
    model = modularize(build(), modules_per_layer=16, example_input=example, gating=gating)
    cloud = CloudModel.opened(model, ArrayRecord(model.state_dict()), version=0)
    for number in (1, 5, 16):
        selection = {layer.name: tuple(range(16 - number, 16)) for layer in model.layers.values()}
        arrays, config = cloud.pack(selection)
        told = ConfigRecord({**config, BATCH_NORM: "frozen", "server-round": 10**6})
        sent = content_bytes(RecordDict({"arrays": arrays, "config": told}))
        price = model.costs.of(selection).communication_bytes
        assert sent <= price <= sent + 8192


def test_what_a_run_returns_and_shows_is_in_rows():
    """Or safetensors, and whoever else wants contiguous tensors, would refuse it."""
    model, shown = build_model(), []

    def look(server_round, arrays):
        shown.append(arrays)

    result = ECLM(model).start(
        grid_of(eclm_app()), ArrayRecord(model.state_dict()), num_rounds=1, evaluate_fn=look
    )
    for arrays in (result.arrays, *shown):
        assert all(t.is_contiguous() for t in arrays.to_torch_state_dict().values())
    assert len(shown) == 2
