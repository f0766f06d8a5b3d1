import numpy as np
import pytest
from federated import build_model, eclm_app, grid_of
from flwr.app import ArrayRecord
from flwr.common import RecordDict

from eclm_flower import ECLM, Budget
from eclm_flower.adaptation import DeviceProfile, derive
from eclm_flower.federation.messages import (
    costs_from_config,
    costs_to_config,
    profile_to_metrics,
)
from eclm_flower.modular import RESOURCES


def budget(model, device):
    return Budget.share_of(model.costs, communication_bytes=(1 + device % 3) / 4)


def run(derive_on, *, rounds=3, between=None, answers=None, app=None, nested=False, **options):
    model = build_model()
    if nested:
        model.selector.prefer_in_order("0", by=0.5)
    strategy = ECLM(model, derive_on=derive_on, weighting="examples", **options)

    def spoil(device, answer):
        return answer

    app = app or eclm_app(budget=budget, spoil=spoil)

    def recorded(message, context):
        answer = app(message, context)
        if answers is not None and message.metadata.message_type == "query":
            answers.append((message, answer))
        if between is not None:
            between(context)
        return answer

    result = strategy.start(grid_of(recorded), ArrayRecord(model.state_dict()), rounds, timeout=5)
    return strategy, result


@pytest.mark.parametrize("nested", [False, True])
def test_both_ways_give_the_same_modules_and_numbers(nested):
    cloud, by_cloud = run("cloud", nested=nested)
    device, by_device = run("device", nested=nested)
    assert cloud.selections == device.selections
    assert len({tuple(s["0"]) for s in device.selections.values()}) > 1
    for key, array in by_cloud.arrays.items():
        assert array.data == by_device.arrays[key].data
    assert by_cloud.evaluate_metrics_clientapp == by_device.evaluate_metrics_clientapp


def test_neither_importance_nor_budget_leaves_the_device():
    answers = []
    strategy, _ = run("device", answers=answers)
    chosen = [
        dict(answer.content.metric_records["profile"])
        for message, answer in answers
        if any(key.startswith("eclm.costs.") for key in message.content["config"])
    ]
    assert len(chosen) == 4 * 3
    greeted = [dict(answer.content.metric_records["profile"]) for _, answer in answers[:4]]
    assert all(not profile.importance for profile in strategy.profiles.values())
    assert all(
        value == float("inf") for told in greeted for key, value in told.items() if "budget" in key
    )
    assert all("eclm.importance.0" not in told for told in greeted)
    assert all(set(told) == {"eclm.device", "eclm.modules.0"} for told in chosen)
    assert all(not profile.importance for profile in strategy.profiles.values())
    knows = DeviceProfile(device=1, selection={"0": (0, 1)}, mixture=np.array([0.0, 1.0]))
    assert set(profile_to_metrics(knows)) == {"eclm.device", "eclm.modules.0"}


def test_the_selector_is_sent_once():
    answers = []
    run("device", answers=answers)
    assert sum(bool(message.content.array_records) for message, _ in answers) == 4


def test_a_device_that_lost_its_scores_is_sent_the_selector_again():
    rounds = []

    def forget(context):
        rounds.append(1)
        if len(rounds) == 4 + 4 + 4 + 4:  # greeting, profile, training, evaluation of round 1
            context.state = RecordDict()

    answers = []
    _, result = run("device", between=forget, answers=answers, rounds=3)
    history = result.train_metrics_clientapp
    assert [history[r]["eclm-merged"] for r in (1, 2, 3)] == [4, 3, 4]
    assert sum(bool(message.content.array_records) for message, _ in answers) == 5


def test_a_device_without_a_fitting_sub_model_is_left_out():
    def too_small(model, device):
        return Budget(memory_bytes=1) if device == 2 else Budget()

    _, result = run("device", app=eclm_app(budget=too_small))
    assert result.train_metrics_clientapp[1]["eclm-merged"] == 3
    assert result.train_metrics_clientapp[1]["eclm-infeasible"] == 1


@pytest.mark.parametrize("modules", [[4], [0, 0], [], [-1], [1.5]])
def test_modules_that_do_not_exist_are_refused(modules):
    def lie(message, context):
        answer = app(message, context)
        if "profile" in answer.content and context.node_config["partition-id"] == 0:
            told = answer.content["profile"]
            if "eclm.modules.0" in told:
                told["eclm.modules.0"] = modules
        return answer

    app = eclm_app(budget=budget)
    model = build_model()
    strategy = ECLM(model, derive_on="device")
    result = strategy.start(grid_of(lie), ArrayRecord(model.state_dict()), 1, timeout=5)
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["eclm-merged"], metrics["eclm-refused-modules"]) == (3, 1)


def test_a_device_may_not_choose_when_the_cloud_derives():
    def choose(message, context):
        answer = app(message, context)
        if "profile" in answer.content and context.node_config["partition-id"] == 0:
            answer.content["profile"]["eclm.modules.0"] = [0, 1, 2, 3]
        return answer

    app = eclm_app(budget=budget)
    model = build_model()
    result = ECLM(model).start(grid_of(choose), ArrayRecord(model.state_dict()), 1, timeout=5)
    assert result.train_metrics_clientapp[1]["eclm-merged"] == 3


def test_costs_survive_the_way_to_the_device():
    costs = build_model().costs
    told = costs_from_config(costs_to_config(costs), costs)
    importance = {"0": np.array([0.1, 0.4, 0.3, 0.2])}
    limit = Budget.share_of(costs, memory_bytes=0.5)
    for name, cost in {"": costs.shared, **costs.per_module}.items():
        got = told.per_module[name] if name else told.shared
        assert [getattr(got, r) for r in RESOURCES] == [getattr(cost, r) for r in RESOURCES]
    assert derive(importance, told, limit) == derive(importance, costs, limit)
    assert costs_from_config({}, costs) is None
