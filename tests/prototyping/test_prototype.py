"""The offline stage end to end, on scikit-learn's digits."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from eclm_flower.adaptation.derivation import derive
from eclm_flower.errors import PrototypingError
from eclm_flower.modular import modularize
from eclm_flower.prototyping import PrototypingConfig, accuracy, prototype, stages
from eclm_flower.prototyping.grouping import unit_responses
from eclm_flower.prototyping.proxy import ProxyData
from eclm_flower.prototyping.stages import (
    budget_of,
    by_importance,
    enhance_abilities,
    mean_gates,
    train_as_deployed,
    train_selector,
)

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")
MODULES = 16
FEW_EPOCHS = {"epochs": 8, "selector_epochs": 6, "enhancing_epochs": 4, "core_modules": 2}


class Digits:
    x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    y = torch.tensor(load_digits().target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    proxy, held_out = order[:1200], order[1200:]


def rows(part, classes=range(10)):
    """Samples of some classes."""
    chosen = part[torch.isin(Digits.y[part], torch.tensor(list(classes)))]
    return TensorDataset(Digits.x[chosen], Digits.y[chosen])


def build(gating="uniform", top_k=None):
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    return modularize(
        body,
        modules_per_layer=MODULES,
        example_input=Digits.x[:1],
        selector_share=0.3,
        gating=gating,
        top_k=top_k,
    )


def run(model, **parameters):
    config = PrototypingConfig(**{**FEW_EPOCHS, **parameters})
    return prototype(
        model,
        rows(Digits.proxy),
        sub_tasks=Digits.y[Digits.proxy],
        config=config,
        validation=rows(Digits.held_out),
        progress=False,
    )


@pytest.fixture(scope="module")
def deployed():
    model = build()
    return model, run(model)


def test_a_quarter_of_the_modules_chosen_by_importance_serves_a_two_class_device(deployed):
    model, _ = deployed
    rng = np.random.default_rng(0)
    chosen, random = [], []
    for classes in itertools.combinations(range(10), 2):
        importance = model.importance([rows(Digits.proxy, classes).tensors[0]])["0"]
        own = np.argsort(-importance)[: MODULES // 4]
        some = rng.choice(MODULES, MODULES // 4, replace=False)
        test = rows(Digits.held_out, classes)
        chosen.append(accuracy(model.sub_model({"0": own}), test))
        random.append(accuracy(model.sub_model({"0": some}), test))
    assert np.mean(chosen) > 0.85
    assert np.mean(chosen) > np.mean(random) + 0.2


def test_the_whole_model_stays_as_good_as_after_the_first_stage(deployed):
    _, report = deployed
    assert report.accuracy["whole model"] > 0.85
    assert report.accuracy["sub-models as deployed"] > report.accuracy["whole model"] - 0.02


def test_training_the_selector_leaves_the_model_alone(deployed):
    _, report = deployed
    assert report.accuracy["selector"] == report.accuracy["whole model"]


def test_the_report_has_all_stages(deployed):
    _, report = deployed
    assert {stage: len(losses) for stage, losses in report.losses.items()} == {
        "whole model": 8,
        "selector": 6,
        "sub-models as deployed": 4,
    }
    assert set(report.accuracy) == set(report.losses)
    assert all(losses[-1] < losses[0] for losses in report.losses.values())
    assert report.assignment["0"].shape == (10, MODULES)
    assert report.assignment["0"][:, :2].all()  # the core
    assert (report.assignment["0"].sum(axis=1) <= 6).all()


def test_the_selector_ranks_the_modules_of_a_sub_task_first(deployed):
    model, report = deployed
    gates = mean_gates(model.selector, ProxyData(rows(Digits.proxy), Digits.y[Digits.proxy]))["0"]
    assigned = report.assignment["0"]
    assert (gates * assigned).sum() / 10 > 0.7
    assert assigned[np.arange(10), gates.argmax(axis=1)].all()


def test_without_a_core_every_sub_task_orders_all_modules_for_itself():
    model = build()
    report = run(model, core_modules=0)
    assert not report.assignment["0"].all(axis=0).any()
    gates = mean_gates(model.selector, ProxyData(rows(Digits.proxy), Digits.y[Digits.proxy]))["0"]
    orders = np.argsort(-gates, axis=1)
    assert len(np.unique(orders, axis=0)) == 10
    assert len(np.unique(orders[:, 0])) >= 4


def test_the_same_seed_gives_the_same_model_bit_for_bit(deployed):
    again = build()
    torch.manual_seed(1234)  # the global generator has no part in it
    run(again)
    state = deployed[0].state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())

    other = build()
    run(other, seed=1)
    assert not torch.equal(other.state_dict()["body.0.weight"], state["body.0.weight"])


def test_a_trained_model_can_come_in(deployed):
    model = build()
    model.body.load_state_dict(deployed[0].body.state_dict())
    report = run(model, epochs=0, enhancing_epochs=0)
    assert list(report.losses) == ["selector"]
    assert not model.training
    assert accuracy(model, rows(Digits.held_out)) == accuracy(deployed[0], rows(Digits.held_out))


def test_a_model_without_training_is_only_regrouped():
    model = build()
    before = model.body(Digits.x[:50])
    run(model, epochs=0, selector_epochs=0, enhancing_epochs=0)
    torch.testing.assert_close(model.body(Digits.x[:50]), before)
    proxy = [(Digits.x[Digits.proxy], Digits.y[Digits.proxy])]
    contribution = unit_responses(model, proxy, 10)["0"].mean(axis=0)
    core = contribution[: 2 * 128 // MODULES]
    assert (np.diff(core) <= 0).all()
    assert core.min() >= contribution[len(core) :].max()


@pytest.mark.parametrize("top_k", [None, 4])
def test_the_papers_way(top_k):
    model = build("selector", top_k)
    report = run(model, method="paper", epochs=20, modules_per_sub_task=4)
    assert list(report.losses) == ["end-to-end", "ability enhancing"]
    assert report.accuracy["ability enhancing"] > 0.8
    losses = report.losses["ability enhancing"]
    assert losses[-1] < losses[0]
    proxy = ProxyData(rows(Digits.proxy), Digits.y[Digits.proxy])
    gates = mean_gates(model.selector, proxy, top_k=top_k)["0"]
    assert (report.assignment["0"].sum(axis=1) <= 4).all()
    assert (gates * report.assignment["0"]).sum() / 10 > 0.4  # 4 of 16 would have 0.25 by chance


def divergence(model, proxy, targets):
    """Mean KL(P || g) by its definition."""
    with torch.no_grad():
        gates = model.selector(proxy.data.tensors[0])["0"].softmax(dim=1).double()
    wanted = targets[proxy.sub_tasks]
    terms = torch.where(wanted > 0, wanted * (wanted.clamp(min=1e-12) / gates).log(), 0)
    return float(terms.sum(dim=1).mean())


@pytest.mark.parametrize("stage", [train_selector, enhance_abilities])
def test_the_selector_moves_towards_its_targets(stage):
    model = build("selector")
    proxy = ProxyData(rows(Digits.proxy), Digits.y[Digits.proxy])
    targets = torch.zeros(10, MODULES, dtype=torch.float64)
    targets[torch.arange(10), torch.arange(10)] = 1  # sub-task t uses module t
    config = PrototypingConfig(selector_epochs=4, enhancing_epochs=4, enhancing_learning_rate=0.1)
    before = divergence(model, proxy, targets)
    assert before == pytest.approx(math.log(MODULES))
    body = copy.deepcopy(model.body.state_dict())
    losses = list(stage(model, proxy, {"0": targets}, config, torch.Generator().manual_seed(0)))
    assert len(losses) == 4
    assert divergence(model, proxy, targets) < 0.6 * before
    untouched = all(torch.equal(t, body[k]) for k, t in model.body.state_dict().items())
    assert untouched is (stage is train_selector)


def test_sub_models_train_as_on_devices_without_statistics_and_selector(small_mlp):
    model = modularize(small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6))
    before = copy.deepcopy(model.state_dict())
    tasks = torch.arange(60) % 3
    proxy = ProxyData(TensorDataset(torch.randn(60, 6), tasks), tasks)
    config = PrototypingConfig(enhancing_epochs=1, batch_size=16)
    choose = by_importance(mean_gates(model.selector, proxy), model.costs)
    assert (
        len(list(train_as_deployed(model, proxy, choose, config, torch.Generator(), epochs=1))) == 1
    )
    moved = {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}
    assert moved == {f"body.{name}" for name, _ in model.body.named_parameters()}


def test_the_whole_model_trains_beside_the_sub_models(small_mlp):
    """Modules that no simulated device ever holds move too."""
    model = modularize(small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6))
    layer = model.layers["0"]
    before = layer.packed("0.weight", model.body[0].weight).detach().clone()
    tasks = torch.arange(60) % 3
    proxy = ProxyData(TensorDataset(torch.randn(60, 6), tasks), tasks)
    config = PrototypingConfig(enhancing_epochs=1, budget_shares=(0.25,), weight_decay=0)
    importance = {name: np.tile([1.0, 0, 0, 0], (3, 1)) for name in model.layers}
    choose = by_importance(importance, model.costs)
    list(train_as_deployed(model, proxy, choose, config, torch.Generator(), epochs=1))
    after = layer.packed("0.weight", model.body[0].weight)
    assert ((after - before).flatten(1).norm(dim=1) > 0).all()


def test_sub_tasks_of_equal_importance_but_for_rounding_are_derived_once(small_mlp, monkeypatch):
    model = modularize(small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6))
    asked = []

    def counted(importance, costs, budget):
        asked.append(budget)
        return derive(importance, costs, budget)

    monkeypatch.setattr(stages, "derive", counted)
    rows = np.array([[0.4, 0.3, 0.2, 0.1]]) + 1e-15 * np.arange(3)[:, None]
    choose = by_importance({**dict.fromkeys(model.layers, rows), "deltas": np.eye(3)}, model.costs)
    budgets = [budget_of(model.costs, share) for share in (0.5, 0.75)]
    rng = np.random.default_rng(0)
    chosen = [choose((task,), budget, rng) for task in range(3) for budget in budgets]
    assert chosen == 3 * [
        derive(dict.fromkeys(model.layers, rows[0]), model.costs, b) for b in budgets
    ]
    assert asked == budgets


def test_mean_gates_are_the_load_of_each_sub_task(deployed):
    model, _ = deployed
    proxy = ProxyData(rows(Digits.proxy), Digits.y[Digits.proxy])
    load = mean_gates(model.selector, proxy, batch_size=100)["0"]
    with torch.no_grad():
        gates = F.softmax(model.selector(proxy.data.tensors[0])["0"], dim=1)
    expected = [gates[proxy.sub_tasks == task].mean(dim=0).tolist() for task in range(10)]
    np.testing.assert_allclose(load, expected, rtol=1e-4)
    np.testing.assert_allclose(load.sum(axis=1), 1)


@pytest.mark.parametrize(("gating", "method"), [("uniform", "paper"), ("selector", "deployed")])
def test_gating_and_method_must_match(gating, method):
    with pytest.raises(PrototypingError, match=rf"for method '{method}', got '{gating}'"):
        run(build(gating), method=method)


@pytest.mark.parametrize(("gating", "method"), [("uniform", "deployed"), ("selector", "paper")])
def test_a_single_sample_at_the_end_is_no_matter_to_batch_norm(gating, method):
    body = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    model = modularize(body, example_input=Digits.x[:1], selector_share=1, gating=gating)
    data = TensorDataset(Digits.x[:129], Digits.y[:129])
    config = PrototypingConfig(method=method, epochs=2, enhancing_epochs=2, selector_epochs=1)
    report = prototype(model, data, sub_tasks=data.tensors[1], config=config, progress=False)
    assert report.losses


def test_training_that_diverges_is_an_error():
    with pytest.raises(PrototypingError, match="stage 'whole model' is not finite"):
        run(build(), learning_rate=1e30, epochs=2)


def test_progress_is_shown(capsys):
    config = PrototypingConfig(epochs=1, selector_epochs=1, enhancing_epochs=1, core_modules=2)
    data = rows(Digits.held_out)
    prototype(build(), data, sub_tasks=data.tensors[1], config=config, validation=data)
    shown = capsys.readouterr().out
    for stage in ("whole model", "selector", "sub-models as deployed"):
        assert stage in shown


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"method": "best"}, "method from .*got 'best'"),
        ({"batch_size": 0}, "batch_size >= 1, got 0"),
        ({"modules_per_sub_task": 0}, "modules_per_sub_task >= 1"),
        ({"epochs": -1}, "epochs >= 0, got -1"),
        ({"gate_noise": -0.5}, "gate_noise >= 0"),
        ({"core_share": 1.5}, "core_share from 0 to 1"),
        ({"sub_tasks_per_device": (2, 1)}, "sub_tasks_per_device as"),
        ({"sub_tasks_per_device": (0, 1)}, "sub_tasks_per_device as"),
        ({"budget_shares": ()}, r"budget_shares in \(0, 1\]"),
        ({"budget_shares": (0.5, 0)}, r"budget_shares in \(0, 1\]"),
    ],
)
def test_impossible_parameters_are_refused(parameters, problem):
    with pytest.raises(PrototypingError, match=problem):
        PrototypingConfig(**parameters)


def test_accuracy_is_the_share_of_right_answers():
    x = torch.eye(3)
    assert accuracy(nn.Identity(), TensorDataset(x, torch.tensor([0, 1, 1]))) == pytest.approx(
        2 / 3
    )
    assert math.isnan(accuracy(nn.Identity(), TensorDataset(x[:0], torch.zeros(0))))


def prefix(costs, budget, rng):
    """The first modules, as many as a budget's bytes allow."""
    free = budget.communication_bytes - costs.shared.communication_bytes
    return {"0": range(int(free / costs.per_module["0"].communication_bytes + 1e-6))}


def test_sub_models_can_be_given():
    model = build()
    selector = copy.deepcopy(model.selector.state_dict())
    parts = {"sub_tasks": Digits.y[Digits.proxy], "sub_models": prefix, "progress": False}
    report = prototype(model, rows(Digits.proxy), config=PrototypingConfig(**FEW_EPOCHS), **parts)
    assert list(report.losses) == ["whole model", "sub-models as deployed"]
    held_out = rows(Digits.held_out)
    given, others = (
        accuracy(model.sub_model({"0": own}), held_out) for own in (range(4), range(4, 8))
    )
    assert given > 0.85
    assert given > others + 0.05
    assert all(torch.equal(t, selector[key]) for key, t in model.selector.state_dict().items())


def test_given_sub_models_are_not_for_the_papers_way():
    with pytest.raises(PrototypingError, match="got 'paper'"):
        prototype(
            build("selector"),
            rows(Digits.proxy),
            sub_tasks=Digits.y[Digits.proxy],
            config=PrototypingConfig(method="paper"),
            sub_models=prefix,
        )
