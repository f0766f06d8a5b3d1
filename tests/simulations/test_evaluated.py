"""A sample of the devices stands for all: always the same ones, and no byte is lost."""

import json

import pytest
from experiments import column, run_tiny

from simulations.settings import Settings, SettingsError

STRATEGIES = "eclm,fedavg,local-adaptation"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    out = tmp_path_factory.mktemp("sampled")
    return run_tiny(out, strategies=STRATEGIES, evaluated=2, steps=2, rounds=1), out


def test_the_same_devices_are_evaluated_each_time_for_every_method(sampled):
    rows, _ = sampled
    evaluated = [row for row in rows if row["accuracy_before"]]
    assert len({row["device"] for row in evaluated}) == 2
    times = {(row["strategy"], row["step"], row["round"]) for row in evaluated}
    assert len(evaluated) == 2 * len(times)
    assert {strategy for strategy, *_ in times} == set(STRATEGIES.split(","))


def test_another_seed_evaluates_others(sampled, tmp_path):
    devices = set()
    for seed in range(4):
        rows = run_tiny(tmp_path, strategies="no-adaptation", evaluated=2, seeds=seed, epochs=0)
        devices.add(tuple(row["device"] for row in rows if row["accuracy_before"]))
    assert len(devices) > 1


def test_devices_get_what_they_get_when_all_are_evaluated_and_no_byte_is_lost(sampled, tmp_path):
    rows, _ = sampled
    everyone = run_tiny(tmp_path, strategies=STRATEGIES, steps=2, rounds=1)
    of_all = {(row["strategy"], row["step"], row["round"], row["device"]): row for row in everyone}
    for row in rows:
        if row["accuracy_before"] and row["strategy"] != "eclm":
            same = of_all[row["strategy"], row["step"], row["round"], row["device"]]
            assert row["accuracy_after"] == same["accuracy_after"]
    sent, sent_by_all = (
        sum(column(some, "bytes_up", strategy="fedavg")) for some in (rows, everyone)
    )
    assert sent == sent_by_all > 0


def test_means_are_over_those_evaluated(sampled):
    rows, out = sampled
    summary = json.loads((out / "summary.json").read_text())["strategies"]["fedavg"]
    last = [
        float(row["accuracy_after"])
        for row in rows
        if row["strategy"] == "fedavg" and row["round"] == "2" and row["accuracy_after"]
    ]
    assert summary["accuracy_after"] == pytest.approx(sum(last) / 2)
    assert summary["worst_decile_after"] == pytest.approx(min(last))


def test_more_than_all_are_refused():
    with pytest.raises(SettingsError, match="--evaluated of at most the 20 devices, got 21"):
        Settings(evaluated=21)
