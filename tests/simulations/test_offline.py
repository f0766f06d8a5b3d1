"""One dense start for all kinds of preparation, kept on disk, and the same when read back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from simulations import offline
from simulations.offline import OfflineStage, config_of
from simulations.settings import Settings
from simulations.world import World

TINY = Settings(devices=4, per_round=2, epochs=4, enhancing_epochs=1)


def stage(folder: Path) -> OfflineStage:
    settings = replace(TINY, offline_dir=str(folder))
    return OfflineStage(World(settings, seed=0), settings, Console(quiet=True))


def test_all_kinds_start_from_one_training_of_the_whole_model(tmp_path: Path, monkeypatch):
    starts = []
    prepare = offline.prepare

    def watched(model: object, *args: object, **options: object) -> object:
        starts.append({key: tensor.clone() for key, tensor in model.body.state_dict().items()})
        return prepare(model, *args, **options)

    monkeypatch.setattr(offline, "prepare", watched)
    made = stage(tmp_path)
    for kind in ("modules", "nested", "whole"):
        made.model(kind)
    for start in starts[1:]:
        assert all(torch.equal(start[key], tensor) for key, tensor in starts[0].items())
    assert set(made.accuracies) == {"dense", "modules", "nested", "whole"}


def test_a_model_is_made_once_and_read_back_bit_for_bit(tmp_path: Path, monkeypatch):
    first = stage(tmp_path).model("modules")
    for name in ("prototype", "prepare"):
        monkeypatch.setattr(offline, name, lambda *_, **__: pytest.fail("trained again"))
    again = stage(tmp_path)
    model = again.model("modules")
    for key, tensor in first.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)
    assert model is not again.model("modules")


def test_an_unfinished_file_is_not_taken_for_a_model(tmp_path: Path):
    made = stage(tmp_path)
    unfinished = made._path("dense").with_suffix(".1.unfinished")
    unfinished.write_bytes(b"half a model")
    assert made.model("whole")


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"classes_per_device": 3}, 3),
        ({"classes_per_device": 0}, 1),
        ({"classes_per_device": 0, "feature_shift": "known"}, 2),
        ({"classes_per_device": 0, "alpha": 100.0}, 10),
    ],
)
def test_simulated_devices_see_as_many_sub_tasks_as_real_ones(options: dict, most: int):
    settings = Settings(devices=8, **options)
    config = config_of(World(settings, seed=0), settings)
    assert config.sub_tasks_per_device == (1, most)


@pytest.mark.parametrize(("options", "expected"), [({}, 4), ({"delta_share": 0.5}, 6)])
def test_delta_modules_get_a_third_of_the_epochs_unless_told(options: dict, expected: int):
    settings = Settings(devices=8, enhancing_epochs=12, **options)
    assert config_of(World(settings, seed=0), settings).delta_epochs == expected


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_cloud_distils_as_told(weight: float):
    settings = Settings(devices=8, distillation=weight)
    assert config_of(World(settings, seed=0), settings).distillation == weight
