"""Whatever could make two prepared models differ tells their files apart; nothing else does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments import run_tiny
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from eclm_flower import PrototypingConfig
from simulations import offline, offline_digest
from simulations.augmentation import flip_and_crop
from simulations.offline import OfflineStage
from simulations.offline_digest import digest_of_start
from simulations.settings import Settings
from simulations.world import World

BASE = Settings(devices=4, per_round=2, epochs=4, enhancing_epochs=1, fleet="uniform:0.5")


def names(settings: Settings = BASE, seed: int = 0) -> tuple[str, str]:
    # As in a run, where the world is that of the devices.
    stage = OfflineStage(World(settings.for_devices(), seed), settings, Console(quiet=True))
    return stage._path("dense").name, stage._path("nested").name


@pytest.mark.parametrize(
    "changed",
    [
        {"dataset": "digits", "judged_on": "validation"},
        {"model": "slim-resnet"},
        {"modules": 8},
        {"epochs": 5},
        {"classes_per_device": 0, "feature_shift": "known"},
        {"classes_per_device": 0, "feature_shift": "known", "strength": 2},
        {"classes_per_device": 0, "feature_shift": "known", "views": ("plain", "noise")},
    ],
)
def test_what_the_whole_model_depends_on(changed: dict):
    dense, nested = names(replace(BASE, **changed))
    assert dense != names()[0]
    assert nested != names()[1]


@pytest.mark.parametrize(
    "changed",
    [
        {"enhancing_epochs": 2},
        {"enhancing_epochs": 4, "delta_share": 0.5},
        {"distillation": 0.5},
        {"fleet": "uniform:0.25"},
        {"classes_per_device": 3},
    ],
)
def test_what_only_the_further_preparation_depends_on(changed: dict):
    dense, nested = names(replace(BASE, **changed))
    assert dense == names()[0]
    assert nested != names()[1]


def test_fleets_and_label_skews_really_start_from_the_same_whole_model(tmp_path: Path):
    models = []
    for changed in ({}, {"fleet": "uniform:0.25"}, {"classes_per_device": 3}):
        settings = replace(BASE, **changed, offline_dir=str(tmp_path / str(len(models))))
        models.append(OfflineStage(World(settings, 0), settings, Console(quiet=True)))
    for stage in models:
        stage.model("whole")
    first, *others = (stage._path("dense").read_bytes() for stage in models)
    assert others == [first, first]


@pytest.mark.parametrize(
    "changed",
    [{"rounds": 3}, {"learning_rate": 0.5}, {"guard": True}, {"steps": 3}, {"per_round": 1}],
)
def test_what_happens_online_changes_nothing(changed: dict):
    assert names(replace(BASE, **changed)) == names()


def test_seeds_strengths_and_views_are_told_apart():
    views = {"classes_per_device": 0, "feature_shift": "known"}
    worlds = [{}, {"strength": 2}, {"views": ("plain", "noise")}, {"views": ("noise", "plain")}]
    digests = {names(replace(BASE, **views, **more))[0] for more in worlds}
    assert len({*digests, names()[0], names(seed=1)[0].replace("-1-", "-0-")}) == 6


def test_other_code_makes_other_models(monkeypatch: pytest.MonkeyPatch):
    before = names()
    digest = offline_digest.source_digest
    monkeypatch.setattr(offline_digest, "source_digest", lambda of: digest(of) + "edited")
    assert not set(before) & set(names())


def test_runs_share_what_is_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shared = {"offline_dir": str(tmp_path / "shared"), "rounds": 1}
    first = run_tiny(tmp_path / "first", strategies="eclm,nested", **shared)
    assert not (tmp_path / "first" / "offline").exists()
    for name in ("prototype", "prepare"):
        monkeypatch.setattr(offline, name, lambda *_, **__: pytest.fail("trained again"))
    again = run_tiny(tmp_path / "again", strategies="eclm,nested", **shared)
    assert again == first
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run_tiny(tmp_path / "other", strategies="nested", **{**shared, "enhancing_epochs": 2})


def test_a_run_trains_its_cloud_with_options_that_no_device_hears_of(tmp_path):
    shared = {"offline_dir": tmp_path / "models", "rounds": 0, "strategies": "nested"}
    for number, weight in enumerate((0.0, 0.5)):
        run_tiny(tmp_path / str(number), **shared, distillation=weight)
    assert len(list((tmp_path / "models").glob("dense-*.safetensors"))) == 1
    plain, distilled = (load_file(f) for f in (tmp_path / "models").glob("nested-*.safetensors"))
    assert any(not torch.equal(plain[key], tensor) for key, tensor in distilled.items())


def test_each_thing_that_training_is_given_counts():
    world = World(BASE, 0)
    x, y = world.environment.proxy().tensors
    tasks, config = world.environment.proxy_sub_tasks, PrototypingConfig()

    def digest(
        x=x, y=y, tasks=tasks, config=config, augment=None, weight=0.0, compute="cpu"
    ) -> str:
        model = world.build_model()
        with torch.no_grad():
            next(model.body.parameters())[0, 0] += weight
        return digest_of_start(model, TensorDataset(x, y), tasks, config, augment, compute)

    other_x = x.clone()
    other_x[-1, 0, 0, 0] += 1e-3
    digests = {
        digest(),
        digest(x=other_x),
        digest(y=y.flip(0)),
        digest(tasks=tasks.flip(0)),
        digest(config=PrototypingConfig(distillation=0.4)),
        digest(augment=flip_and_crop),
        digest(weight=1e-3),
        digest(compute="cuda"),
    }
    assert len(digests) == 8
    assert digest() in digests
