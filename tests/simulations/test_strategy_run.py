"""One strategy through its adaptation steps, with devices that come, go and keep things."""

import math

import numpy as np
import pytest
from experiments import column, run_tiny

from strategies import METHODS


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Three steps of two strategies, with everything that can move."""
    out = tmp_path_factory.mktemp("steps")
    return run_tiny(
        out, steps=3, strategies="eclm,fedavg,local-adaptation,no-adaptation", seeds="0"
    )


def test_every_step_has_rows_from_its_beginning_to_its_end(steps):
    for strategy, rounds in (
        ("eclm", [0, 1, 2, 2, 3, 4, 4, 5, 6]),
        ("fedavg", [0, 1, 2, 2, 3, 4, 4, 5, 6]),
        ("local-adaptation", [2, 4, 6]),
        ("no-adaptation", [2, 4, 6]),
    ):
        assert column(steps, "round", strategy=strategy, device=0) == rounds
        assert len(column(steps, "round", strategy=strategy)) == 6 * len(rounds)


def test_accuracy_right_after_a_shift_is_of_the_model_held_before(steps):
    held = column(steps, "accuracy_held", strategy="eclm")
    first = [(row["step"], row["round"]) for row in steps if row["strategy"] == "eclm"]
    assert [not math.isnan(value) for value in held] == [
        pair in (("1", "2"), ("2", "4")) for pair in first
    ]
    # Who keeps its model is evaluated with just what it held.
    for step in (1, 2):
        kept = column(steps, "accuracy_held", strategy="local-adaptation", step=step)
        before = column(steps, "accuracy_before", strategy="local-adaptation", step=step)
        assert kept == before
    adapted = column(steps, "accuracy_after", strategy="local-adaptation", step=1)
    assert sum(adapted) > sum(column(steps, "accuracy_held", strategy="local-adaptation", step=1))


def test_right_after_a_shift_a_device_can_fall_back_on_what_it_was_sent(steps):
    def after_shift(strategy: str) -> tuple[float, float]:
        held = column(steps, "accuracy_held", strategy=strategy)
        fallback = column(steps, "accuracy_fallback", strategy=strategy)
        assert [math.isnan(value) for value in held] == [math.isnan(value) for value in fallback]
        return np.nanmean(held), np.nanmean(fallback)

    held, fallback = after_shift("eclm")  # knows its new classes, too
    assert fallback > held + 0.3
    held, fallback = after_shift("local-adaptation")  # not only if the cloud sends anew
    assert fallback > held + 0.1
    held, fallback = after_shift("no-adaptation")
    assert fallback == held


def test_no_adaptation_adapts_nothing(steps):
    rows = [row for row in steps if row["strategy"] == "no-adaptation"]
    assert all(row["accuracy_before"] == row["accuracy_after"] for row in rows)
    assert len({row["accuracy_global"] for row in rows}) == 1
    assert column(steps, "seconds", strategy="no-adaptation") == [0.0] * 18
    assert column(steps, "clock", strategy="no-adaptation") == [0.0] * 18


def test_models_are_paid_for_when_they_are_handed_out(steps):
    for strategy, paid in (("eclm", [0, 1, 2]), ("fedavg", [0, 1, 2]), ("local-adaptation", [0])):
        for step in range(3):
            sent = column(steps, "bytes_delivered", strategy=strategy, step=step, device=2)
            assert (sent[-1] > 1000) == (step in paid)
            assert not any(sent[:-1])


def test_importance_is_asked_anew_when_data_has_shifted(tmp_path):
    steps = run_tiny(tmp_path, steps=3, strategies="eclm-chosen")

    def asked(step: int, server_round: int) -> float:
        return min(column(steps, "bytes_down", step=step, round=server_round))

    # Only a query with the selector is that large.
    assert asked(0, 0) > 4 * asked(0, 1)
    assert asked(1, 2) > 4 * asked(1, 3)
    assert asked(2, 4) > 4 * asked(2, 5)


def test_the_clock_ticks_in_rounds_and_never_backwards(steps):
    clock = column(steps, "clock", strategy="eclm", device=0)
    assert clock[0] == 0
    assert clock == sorted(clock)
    assert clock[2] == clock[3] < clock[4]  # a shift takes no time, a round does
    assert column(steps, "clock", strategy="fedavg", device=0)[-1] > clock[-1]


def test_budgets_move_with_the_moment(steps):
    courses = [column(steps, "modules", strategy="eclm", device=device) for device in range(6)]
    assert any(len(set(course)) > 1 for course in courses)
    assert set(column(steps, "modules", strategy="fedavg")) == {16}


def test_a_uniform_fleet_holds_the_same_all_the_time(tmp_path):
    rows = run_tiny(tmp_path, steps=2, rounds=1, strategies="eclm", fleet="uniform:0.25")
    assert set(column(rows, "modules")) == {4}
    assert len(set(column(rows, "memory"))) == 1


def test_without_cloud_a_device_asks_once(tmp_path):
    rows = run_tiny(tmp_path, steps=3, strategies="eclm-no-prior", variant="no-cloud")
    assert len(rows) == 3 * 6
    for device in range(6):
        delivered = column(rows, "bytes_delivered", device=device)
        assert delivered[0] > 1000
        assert delivered[1:] == [0, 0]
        assert column(rows, "bytes_up", device=device)[1:] == [0, 0]
        assert len(set(column(rows, "modules", device=device))) == 1
        held = column(rows, "accuracy_held", device=device)
        assert held[1:] == column(rows, "accuracy_before", device=device)[1:]
    assert len({row["accuracy_global"] for row in rows}) == 1


def test_a_device_that_knows_its_new_classes_tells_its_model_without_the_cloud(tmp_path):
    rows = run_tiny(tmp_path, steps=3, strategies="eclm", variant="no-cloud")
    held, told = column(rows, "accuracy_held"), column(rows, "accuracy_before")
    shifted = [
        (before, after) for before, after in zip(held, told, strict=True) if not math.isnan(before)
    ]
    assert len(shifted) == 2 * 6
    before, after = np.mean(shifted, axis=0)
    assert after > before + 0.1


def test_without_local_training_a_device_only_fetches(tmp_path):
    rows = run_tiny(tmp_path, steps=3, strategies="eclm", variant="no-local-training")
    assert len(rows) == 3 * 6
    assert all(row["accuracy_before"] == row["accuracy_after"] for row in rows)
    assert min(column(rows, "bytes_delivered")) > 1000
    assert max(column(rows, "bytes_up")) < 2000  # profiles, and nothing trained


def test_a_world_in_which_nobody_answers_leaves_the_cloud_as_it_is(tmp_path):
    rows = run_tiny(tmp_path, dropout=0.999, strategies="eclm,fedavg")
    for strategy in ("eclm", "fedavg"):
        assert len(set(column(rows, "accuracy_global", strategy=strategy))) == 1
        assert max(column(rows, "clock", strategy=strategy)) > 0
        assert max(column(rows, "bytes_down", strategy=strategy, round=1)) > 1000


def test_who_is_offline_is_sent_nothing_and_costs_no_time(tmp_path):
    rows = run_tiny(tmp_path, availability=0.001, strategies="fedavg", evaluate_every=2)
    assert set(column(rows, "clock")) == {0}
    assert max(column(rows, "bytes_down", round=2)) < 1000


def test_shifts_can_be_some_steps_apart(tmp_path):
    rows = run_tiny(tmp_path, steps=4, shift_every=2, rounds=1, strategies="eclm")
    shifted = {row["step"] for row in rows if row["accuracy_held"]}
    assert shifted == {"2"}


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 0.5),
        # Of the core, what a sub-task's delta modules change has to be sent again.
        ({"feature_shift": "known", "views": "plain,negative"}, 0.9),
    ],
)
def test_a_module_cache_saves_bytes_and_changes_no_accuracy(tmp_path, options, share):
    options = {"steps": 2, "rounds": 1, "strategies": "eclm", **options}
    without = run_tiny(tmp_path / "without", **options)
    cached = run_tiny(tmp_path / "with", module_cache=True, **options)
    for name in ("accuracy_before", "accuracy_after", "accuracy_global", "modules"):
        assert column(cached, name) == column(without, name)
    for name in ("accuracy_held", "accuracy_fallback"):
        assert np.array_equal(column(cached, name), column(without, name), equal_nan=True)
    # What was handed out at the end of a step need not be sent again in the next.
    down = [sum(column(rows, "bytes_down", step=1)) for rows in (without, cached)]
    assert down[1] < share * down[0]


@pytest.mark.parametrize(
    "options", [{"strategies": "eclm", "variant": "no-cloud"}, {"strategies": "adaptivenet"}]
)
def test_devices_with_a_module_cache_can_keep_their_models(tmp_path, options):
    without = run_tiny(tmp_path / "without", steps=2, rounds=1, **options)
    cached = run_tiny(tmp_path / "with", steps=2, rounds=1, module_cache=True, **options)
    assert {row["step"] for row in cached} == {"0", "1"}
    for name in (
        "accuracy_before",
        "accuracy_after",
        "accuracy_held",
        "accuracy_fallback",
        "modules",
    ):
        assert np.array_equal(column(cached, name), column(without, name), equal_nan=True)


def test_one_device_is_a_fleet(tmp_path):
    rows = run_tiny(tmp_path, devices=1, per_round=1, rounds=1, strategies="all")
    assert {row["strategy"] for row in rows} == set(METHODS)


@pytest.mark.parametrize("feature_shift", ["known", "new"])
def test_feature_shift_runs(tmp_path, feature_shift):
    options = {"feature_shift": feature_shift, "strategies": "eclm", "rounds": 1, "steps": 2}
    rows = run_tiny(tmp_path, views="negative,noise", **options)
    assert len(rows) == 6 * 4


def test_every_strategy_runs(tmp_path):
    rows = run_tiny(tmp_path, strategies="all", rounds=1, steps=2, devices=3, per_round=2)
    assert {row["strategy"] for row in rows} == set(METHODS)
    for name in METHODS:
        assert max(column(rows, "accuracy_after", strategy=name)) > 0.5
