"""The small rows say what the run's rows say, survive their files, and know what made them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from simulations.results import Row, to_frame
from simulations.settings import Settings, SettingsError
from simulations.summary import summarise
from simulations.tables.rows import Rows, course, ends, identity, read_rows, write_rows

SETTINGS = Settings(strategies=("eclm", "fedavg"), seeds=(0, 1), steps=3, rounds=2)


def frame(strategies: tuple[str, ...] = ("eclm", "fedavg"), seeds: tuple[int, ...] = (0, 1)):
    """Rows of a run of 3 steps with 2 rounds each and 4 devices."""
    rng = np.random.default_rng(0)
    rows = []
    for strategy in strategies:
        for seed in seeds:
            for step in range(3):
                for r in (0, 1, 2):
                    for device in range(4):
                        accuracies = dict.fromkeys(Row.__annotations__, 0.0)
                        accuracies |= {
                            name: float(rng.random())
                            for name, kind in Row.__annotations__.items()
                            if kind == "float"
                        }
                        for name, value in (("held", 0.25), ("fallback", 0.75)):
                            first = step and r == 0
                            accuracies[f"accuracy_{name}"] = value if first else float("nan")
                        accuracies |= {"strategy": strategy, "seed": seed, "step": step}
                        accuracies |= {"round": 2 * step + r, "device": device}
                        accuracies |= {"bytes_down": 1000, "bytes_up": 500, "modules": 5}
                        accuracies |= {"bytes_delivered": 70 if r == 2 else 0}
                        rows.append(Row(**accuracies))
    return to_frame(rows)


def test_ends_are_means_over_the_ends_of_steps():
    run = frame()
    made = ends(run)
    assert len(made) == 2 * 2 * 4
    one = made[(made["strategy"] == "eclm") & (made["seed"] == 1) & (made["device"] == 2)].iloc[0]
    own = run[(run["strategy"] == "eclm") & (run["seed"] == 1) & (run["device"] == 2)]
    last = own[own["round"].isin([2, 4, 6]) & (own["round"] == 2 * own["step"] + 2)]
    assert len(last) == 3
    assert one["adapted"] == pytest.approx(last["accuracy_after"].mean(), abs=1e-4)
    assert one["masked"] == pytest.approx(last["masked_after"].mean(), abs=1e-4)
    assert (one["held"], one["fallback"]) == (0.25, 0.75)


def test_who_is_not_evaluated_has_no_end_and_costs_bytes():
    run = frame()
    told = [name for name, kind in Row.__annotations__.items() if kind == "float"]
    told.remove("clock")
    sample = run.assign(**{name: run[name].where(run["device"] < 2) for name in told})
    made = ends(sample)
    assert set(made["device"]) == {0, 1}
    whole = ends(run)
    pd.testing.assert_frame_equal(made, whole[whole["device"] < 2].reset_index(drop=True))
    assert course(sample)["bytes"].equals(course(run)["bytes"])


def test_a_course_has_every_round_of_the_first_step_and_the_ends_of_others():
    made = course(frame())
    own = made[(made["strategy"] == "eclm") & (made["seed"] == 1)]
    assert own["round"].tolist() == [0, 1, 2, 4, 6]
    assert own["bytes"].tolist() == [4 * 1500 * n for n in (1, 2, 3, 6, 9)]


def test_means_are_those_of_a_runs_own_summary():
    run = frame()
    summary = summarise(run)
    adapted = ends(run).groupby("strategy")["adapted"].mean()
    spent = course(run).groupby(["strategy", "seed"])["bytes"].max().groupby("strategy").mean()
    for strategy, own in summary.items():
        assert adapted[strategy] == pytest.approx(own["mean_over_steps"], abs=1e-4)
        assert spent[strategy] == own["bytes_down"] + own["bytes_up"]


def test_they_survive_their_files(tmp_path: Path):
    assert read_rows(tmp_path, "row").done == set()
    rows = Rows()
    rows.add(frame(), SETTINGS)
    write_rows(rows, tmp_path, "row")
    again = read_rows(tmp_path, "row")
    assert again.done == rows.done == {(s, n) for s in ("eclm", "fedavg") for n in (0, 1)}
    pd.testing.assert_frame_equal(again.ends, rows.ends)
    pd.testing.assert_frame_equal(again.course, rows.course)
    again.check(SETTINGS, tmp_path)
    assert not list(tmp_path.glob("*.unfinished"))


def test_what_is_there_is_kept_and_the_order_of_coming_is_forgotten():
    both, later = Rows(), Rows()
    both.add(frame(), SETTINGS)
    other = frame()
    later.add(other[other["strategy"] == "fedavg"], SETTINGS)
    changed = other.assign(accuracy_after=0.0).where(other["strategy"] == "fedavg", other)
    later.add(changed, SETTINGS)
    pd.testing.assert_frame_equal(later.ends, both.ends)
    pd.testing.assert_frame_equal(later.course, both.course)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"devices": 5}, "--devices was None, got 5"),
        ({"learning_rate": 0.5}, "--learning-rate was None, got 0.5"),
        ({"guard": True}, "--guard"),
        ({"rates": (("eclm", 0.5),)}, "the learning rate of eclm was 0.002, got 0.5"),
    ],
)
def test_other_settings_are_refused(changed: dict, said: str, tmp_path: Path):
    rows = Rows()
    rows.add(frame(), SETTINGS)
    with pytest.raises(SettingsError, match=said):
        rows.check(replace(SETTINGS, **changed), tmp_path / "row")


def test_more_seeds_strategies_and_other_places_are_no_other_settings(tmp_path: Path):
    rows = Rows()
    rows.add(frame(), SETTINGS)
    more = {"seeds": (0, 1, 2), "strategies": ("eclm", "nested"), "out": "/x", "data_dir": "/d"}
    rows.check(replace(SETTINGS, **more, rates=(("nested", 0.5),)), tmp_path)
    assert identity(SETTINGS) == {"steps": 3, "rounds": 2}
