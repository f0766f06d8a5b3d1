"""What the cloud prepares for each kind of method, on scikit-learn's digits."""

import copy
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from eclm_flower import PrototypingConfig, modularize, prototype
from eclm_flower.prototyping import accuracy
from strategies import METHODS
from strategies.offline import WITH_DELTAS, Offline, prepare
from strategies.scaler import scale_hidden_units
from strategies.windows import scattered, window

MODULES, QUARTER = 16, 4
OF_DELTAS = {"modules": 2, "blank": 0}  # of the further epochs
CONFIG = PrototypingConfig(epochs=8, selector_epochs=4, enhancing_epochs=6)
X = torch.tensor(load_digits().data / 16, dtype=torch.float32)
Y = torch.tensor(load_digits().target)
ORDER = torch.randperm(len(Y), generator=torch.Generator().manual_seed(0))
PROXY, TEST = (TensorDataset(X[rows], Y[rows]) for rows in (ORDER[:900], ORDER[900:]))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    model = modularize(
        body, modules_per_layer=MODULES, example_input=X[:1], selector_share=0.3, sub_tasks=10
    )
    config = PrototypingConfig(epochs=8, selector_epochs=0, enhancing_epochs=0)
    prototype(model, PROXY, sub_tasks=PROXY.tensors[1], config=config, progress=False)
    return model


@pytest.fixture(scope="module")
def prepared(trained):
    models = {}
    for offline in get_args(Offline):
        models[offline] = copy.deepcopy(trained)
        report = prepare(
            models[offline],
            PROXY,
            offline=offline,
            config=CONFIG,
            sub_tasks=PROXY.tensors[1],
            validation=TEST,
            progress=False,
        )
        further = {name: len(losses) for name, losses in report.losses.items()}
        further.pop("selector", None)
        assert further.get("delta modules", 0) == OF_DELTAS.get(offline, 0)
        assert (models[offline].deltas is not None) == (offline in WITH_DELTAS)
        assert sum(further.values()) == 6, "every kind takes as many further epochs"
    return models


def quarter(model, choose):
    """Mean accuracy of sub-models of a quarter of the modules."""
    numbers = {"0": QUARTER}
    return np.mean(
        [
            accuracy(model.sub_model(choose(model.costs, numbers, seed)), TEST)
            for seed in range(MODULES)
        ]
    )


def prefix(costs, numbers, seed):
    return window(costs, numbers)


def rolled(costs, numbers, seed):
    return window(costs, numbers, start=seed)


def at_random(costs, numbers, seed):
    return scattered(costs, numbers, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("offline", "choose"), [("nested", prefix), ("windows", rolled), ("branches", at_random)]
)
def test_sub_models_are_best_where_they_were_trained_as_deployed(prepared, offline, choose):
    own = quarter(prepared[offline], choose)
    for other, margin in {
        "nested": 0,
        "windows": -0.05,  # not much between modules in a row and modules at random
        "branches": -0.05,
        "split": 0.02,
        "whole": 0.02,
    }.items():
        if other != offline:
            assert own > quarter(prepared[other], choose) + margin, other


def test_scaled_prefixes_are_good_with_the_scaler(prepared):
    model = prepared["scaled"]
    plain, scaled = (model.sub_model({"0": range(QUARTER)}) for _ in range(2))
    scale_hidden_units(scaled, model.layers.values())
    assert accuracy(scaled, TEST) > 0.85
    x, y = TEST.tensors
    assert F.cross_entropy(scaled(x), y) < F.cross_entropy(plain(x), y)
    assert not any(module._forward_pre_hooks for module in model.body.modules())


def test_the_whole_model_stays_good_in_every_kind(prepared, trained):
    before = accuracy(trained.body, TEST)
    for offline, model in prepared.items():
        assert accuracy(model.body, TEST) > before - 0.03, offline


def test_only_kinds_that_tell_sub_tasks_apart_have_a_selector_that_learned(prepared):
    for offline, model in prepared.items():
        learned = bool(model.selector.heads.weight.any())
        assert learned is (offline in (*OF_DELTAS, "chosen")), offline
        assert (model.deltas is not None) is (offline in OF_DELTAS), offline


def test_eclm_prefers_the_first_modules_for_everyone_unless_they_are_chosen(prepared):
    for offline in (*OF_DELTAS, "no-deltas", "split", "chosen"):
        gates = [prepared[offline].importance([X[y == Y]])["0"] for y in (0, 1)]
        in_order = all((np.diff(of_class) < 0).all() for of_class in gates)
        assert in_order is (offline != "chosen"), offline
        assert np.allclose(*gates) is (offline != "chosen"), offline


def test_whole_and_split_have_equal_whole_models(prepared):
    whole, split = prepared["whole"].body.eval(), prepared["split"].body.eval()
    torch.testing.assert_close(whole(X[:50]), split(X[:50]), rtol=1e-4, atol=1e-4)


def test_blank_deltas_are_zero_and_others_are_not(prepared):
    for offline in OF_DELTAS:
        zero = not any(tensor.any() for tensor in prepared[offline].deltas.tensors.values())
        assert zero is (offline == "blank"), offline


def test_a_teacher_brings_sub_models_closer_to_the_whole_model(trained, prepared):
    taught = copy.deepcopy(trained)
    prepare(
        taught,
        PROXY,
        offline="nested",
        config=replace(CONFIG, distillation=0.5),
        sub_tasks=PROXY.tensors[1],
        validation=TEST,
        progress=False,
    )
    x, _ = TEST.tensors
    distance = []
    for model in (taught, prepared["nested"]):
        small = F.log_softmax(model.sub_model({"0": range(QUARTER)})(x), dim=1)
        distance.append(F.kl_div(small, F.softmax(model.body(x), dim=1), reduction="batchmean"))
    assert distance[0] < distance[1]


def test_every_method_names_a_kind():
    assert {method.offline for method in METHODS.values()} == set(get_args(Offline))
