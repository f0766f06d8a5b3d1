"""Rows, what is made of them, and the notes that let a run go on."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from simulations.report import print_tables, write_report
from simulations.results import Record, Row, read, to_frame
from simulations.settings import Settings, SettingsError
from simulations.summary import curves, summarise


def row(strategy, seed, server_round, device, before, sent=0, **more):
    return Row(
        **{
            "strategy": strategy,
            "seed": seed,
            "step": 0,
            "round": server_round,
            "device": device,
            "accuracy_before": before,
            "accuracy_after": before,
            "masked_before": 1.0,
            "masked_after": 1.0,
            "accuracy_held": math.nan,
            "accuracy_fallback": 0.25,
            "accuracy_global": 0.5,
            "bytes_down": sent,
            "bytes_up": sent,
            "bytes_delivered": 0,
            "modules": 4,
            "memory": 2e6,
            "seconds": 0.5,
            "clock": 10.0 * server_round,
            **more,
        }
    )


ROWS = [
    *(
        row("fedavg", 0, r, d, a, 100 * bool(r))
        for r, a in enumerate([0.5, 0.8, 0.7])
        for d in (0, 1)
    ),
    *(row("eclm", 0, r, d, a, 10 * bool(r)) for r, a in enumerate([0.6, 0.7, 0.9]) for d in (0, 1)),
]


def test_the_summary_is_of_the_last_round():
    summary = summarise(to_frame(ROWS), wall_seconds={"eclm": 3.0})
    assert summary["eclm"]["accuracy_before"] == pytest.approx(0.9)
    assert summary["fedavg"]["accuracy_before"] == pytest.approx(0.7)
    assert summary["fedavg"]["bytes_down"] == 400
    assert (summary["eclm"]["wall_seconds"], summary["fedavg"]["wall_seconds"]) == (3.0, None)
    assert (summary["eclm"]["clock"], summary["eclm"]["memory"]) == (20, 2e6)


def test_the_target_is_the_best_that_fedavg_ever_had():
    summary = summarise(to_frame(ROWS))
    assert summary["fedavg"]["bytes_to_target"] == 2 * 2 * 100  # .8 in round 1
    assert summary["eclm"]["bytes_to_target"] == 2 * 2 * 10 * 2  # .9 in round 2, both rounds' bytes
    assert (summary["fedavg"]["clock_to_target"], summary["eclm"]["clock_to_target"]) == (10, 20)


def test_a_target_never_reached_or_without_fedavg_is_none():
    low = [row("eclm", 0, r, 0, 0.1, 1) for r in range(3)]
    assert summarise(to_frame(ROWS[:6] + low))["eclm"]["bytes_to_target"] is None
    assert summarise(to_frame(low))["eclm"]["clock_to_target"] is None


def test_the_target_is_met_by_the_mean_over_seeds():
    second = [row("fedavg", 1, 1, 0, 0.4, 100), row("eclm", 1, 2, 0, 0.3, 50)]
    summary = summarise(to_frame([*ROWS, *second]))
    # Means: FedAvg .5, .6, .7; ECLM .6, .7, .6.
    assert summary["fedavg"]["bytes_to_target"] == 800
    assert summary["eclm"]["bytes_to_target"] == 40


def test_the_interval_is_over_devices_and_seeds():
    rows = [row("eclm", seed, 1, d, 0.5 + 0.1 * d, 1) for seed in (0, 1) for d in (0, 1)]
    summary = summarise(to_frame(rows))["eclm"]
    assert summary["ci95"] == pytest.approx(1.96 * 0.0577350 / 2, rel=1e-4)


def test_the_worst_decile_is_of_each_seed():
    rows = [row("eclm", seed, 0, d, d / 100 + seed / 10) for seed in (0, 1) for d in range(20)]
    summary = summarise(to_frame(rows))["eclm"]
    assert summary["worst_decile"] == pytest.approx((0.005 + 0.105) / 2)
    few = [row("eclm", 0, 0, d, a) for d, a in enumerate([0.3, 0.2, 0.9])]
    assert summarise(to_frame(few))["eclm"]["worst_decile"] == pytest.approx(0.2)


def test_recovery_is_told_from_right_after_a_shift_to_k_steps_later():
    rows = [
        row("eclm", 0, 2 * step + r, 0, 0.5, step=step, accuracy_after=after, accuracy_held=held)
        for step, r, after, held in (
            (0, 0, 0.1, math.nan),
            (0, 2, 0.2, math.nan),
            (1, 0, 0.1, math.nan),
            (1, 2, 0.4, math.nan),
            (2, 0, 0.1, 0.3),  # data shifted
            (2, 2, 0.6, math.nan),
            (3, 0, 0.1, math.nan),
            (3, 2, 0.8, math.nan),
        )
    ]
    summary = summarise(to_frame(rows), shift_every=2)["eclm"]
    assert summary["accuracy_right_after_shift"] == pytest.approx(0.3)
    assert summary["accuracy_steps_after_shift"] == {0: pytest.approx(0.6), 1: pytest.approx(0.8)}
    assert summary["mean_over_steps"] == pytest.approx(0.5)
    assert summary["accuracy_after"] == pytest.approx(0.8)


def test_bytes_add_up_over_rounds_and_devices():
    course = curves(to_frame(ROWS))
    assert course[course.strategy == "fedavg"]["bytes"].tolist() == [0, 400, 800]


@pytest.mark.parametrize(
    "strategies", [["eclm", "fedavg"], [f"eclm-no-importance{i}" for i in "ab"]]
)
def test_a_report_has_a_picture_and_tables_that_fit(tmp_path: Path, strategies: list[str]):
    rows = [
        replace(r, strategy=name, accuracy_held=0.5)
        for name, old in zip(strategies, ("eclm", "fedavg"), strict=True)
        for r in ROWS
        if r.strategy == old
    ]
    record = Record.begin(Settings(out=str(tmp_path), strategies=tuple(strategies)), "ray")
    record.cloud_model["0"] = {"dense": 0.9, "modules": 0.91}
    for name in strategies:
        record.add(name, 0, [r for r in rows if r.strategy == name], 1.0)
    summary = write_report(record)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["strategies"][strategies[0]]["accuracy_before"] == pytest.approx(0.9)
    assert written["config"]["devices"] == 20
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    console = Console(record=True, width=100)
    print_tables(summary, tmp_path, console)
    text = console.export_text()
    assert "90.0% ± 0.0" in text
    assert "dense 90.0%, modules 91.0%" in text
    tables = text.split("Rows, summary")[0]
    assert "…" not in tables
    assert max(map(len, tables.splitlines())) <= 100


def test_rows_come_back_to_the_last_digit(tmp_path: Path):
    rows = [replace(ROWS[0], accuracy_before=1 / 3, clock=1e-7 / 3, bytes_down=2**60), ROWS[1]]
    record = Record.begin(Settings(out=str(tmp_path)), "ray")
    record.add("fedavg", 0, rows, 1.0)
    again = read(tmp_path / "results.csv")
    assert [replace(r, accuracy_held=0.0) for r in again] == [
        replace(r, accuracy_held=0.0) for r in rows
    ]
    assert all(math.isnan(r.accuracy_held) for r in again)


def test_rows_of_an_earlier_version_lack_what_it_did_not_measure(tmp_path: Path):
    record = Record.begin(Settings(out=str(tmp_path)), "ray")
    record.add("fedavg", 0, list(ROWS[:2]), 1.0)
    path = tmp_path / "results.csv"
    pd.read_csv(path).drop(columns="accuracy_fallback").to_csv(path, index=False)
    again = read(path)
    assert [r.accuracy_before for r in again] == [r.accuracy_before for r in ROWS[:2]]
    assert all(math.isnan(r.accuracy_fallback) for r in again)


def test_a_record_goes_on_where_it_stopped(tmp_path: Path):
    settings = Settings(out=str(tmp_path), seeds=(0, 1))
    record = Record.begin(settings, "ray")
    record.add("fedavg", 0, ROWS[:6], 1.0)
    # Also where the data has moved to another folder.
    again = Record.begin(replace(settings, resume=True, data_dir="elsewhere"), "ray")
    assert again.done == [("fedavg", 0)]
    assert again.frame.equals(record.frame)
    again.add("eclm", 0, ROWS[6:], 2.0)
    # As an uninterrupted run would have written them.
    assert [r.strategy for r in read(tmp_path / "results.csv")] == ["eclm"] * 6 + ["fedavg"] * 6
    assert again.wall_seconds == {"fedavg": 1.0, "eclm": 2.0}


@pytest.mark.parametrize("name", ["devices", "offline"])
def test_a_folder_that_is_of_no_run_is_refused_and_left_alone(tmp_path: Path, name: str):
    own = tmp_path / name / "own.txt"
    own.parent.mkdir()
    own.write_text("kept")
    for resume in (False, True):
        with pytest.raises(SettingsError, match=rf"a folder {name} and no run.json; use another"):
            Record.begin(Settings(out=str(tmp_path), resume=resume), "ray")
    assert own.read_text() == "kept"
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("inner", [".", "shared"])
def test_models_that_are_to_be_used_are_not_taken_for_old_ones(tmp_path: Path, inner: str):
    own, named = Settings(out=str(tmp_path)), tmp_path / "offline" / inner
    named.mkdir(parents=True)
    (named / "model").touch()
    (tmp_path / "link").symlink_to(named)
    for _ in ("without a run", "of the earlier run"):
        for folder in (named, tmp_path / "link"):
            Record.begin(replace(own, offline_dir=str(folder)), "ray")
            assert (named / "model").exists()
    Record.begin(own, "ray")
    assert not named.exists()


def test_a_record_of_other_settings_is_refused_and_left_alone(tmp_path: Path):
    settings = Settings(out=str(tmp_path))
    Record.begin(settings, "ray").add("fedavg", 0, ROWS[:6], 1.0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SettingsError, match=r"--local-epochs was 3, got 4"):
        Record.begin(replace(settings, local_epochs=4, resume=True), "ray")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
