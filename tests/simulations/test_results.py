import json

import pytest
from rich.console import Console

from simulations.results import Row, curves, print_table, summarise, to_frame, write
from simulations.settings import Settings


def row(strategy, seed, server_round, device, before, sent, **more):
    return Row(
        strategy=strategy,
        seed=seed,
        round=server_round,
        device=device,
        accuracy_before=before,
        accuracy_after=more.get("after", before),
        bytes_down=sent,
        bytes_up=sent,
        modules=4,
        seconds=0.5,
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
    summary = summarise(to_frame(ROWS), {"eclm": 3.0, "fedavg": 4.0})
    assert summary["eclm"]["accuracy_before"] == pytest.approx(0.9)
    assert summary["fedavg"]["accuracy_before"] == pytest.approx(0.7)
    assert summary["fedavg"]["bytes_down"] == 400
    assert summary["eclm"]["seconds"] == 3.0
    assert set(summary["eclm"]) >= {
        "accuracy_before",
        "accuracy_after",
        "ci95",
        "bytes_down",
        "bytes_up",
        "bytes_to_target",
        "seconds",
    }


def test_the_target_is_the_best_that_fedavg_ever_had():
    summary = summarise(to_frame(ROWS), {})
    assert summary["fedavg"]["bytes_to_target"] == 2 * 2 * 100  # .8 in round 1
    assert summary["eclm"]["bytes_to_target"] == 2 * 2 * 10 * 2  # .9 in round 2, both rounds' bytes


def test_a_target_never_reached_or_without_fedavg_is_none():
    low = [row("eclm", 0, r, 0, 0.1, 1) for r in range(3)]
    assert summarise(to_frame(ROWS[:6] + low), {})["eclm"]["bytes_to_target"] is None
    assert summarise(to_frame(low), {})["eclm"]["bytes_to_target"] is None


def test_the_target_is_met_by_the_mean_over_seeds():
    second = [row("fedavg", 1, 1, 0, 0.4, 100), row("eclm", 1, 2, 0, 0.3, 50)]
    summary = summarise(to_frame([*ROWS, *second]), {})
    # Means: FedAvg .5, .6, .7; ECLM .6, .7, .6.
    assert summary["fedavg"]["bytes_to_target"] == 800
    assert summary["eclm"]["bytes_to_target"] == 40


def test_the_interval_is_over_devices_and_seeds():
    rows = [row("eclm", seed, 1, d, 0.5 + 0.1 * d, 1) for seed in (0, 1) for d in (0, 1)]
    summary = summarise(to_frame(rows), {})["eclm"]
    assert summary["ci95"] == pytest.approx(1.96 * 0.0577350 / 2, rel=1e-4)


def test_bytes_add_up_over_rounds_and_devices():
    course = curves(to_frame(ROWS))
    assert course[course.strategy == "fedavg"]["bytes"].tolist() == [0, 400, 800]


def test_a_run_leaves_rows_summary_picture_and_table(tmp_path):
    settings = Settings(out=str(tmp_path))
    accuracies = {"0": {"before_modularising": 0.9, "after_offline_stage": 0.91}}
    summary = write(settings, "ray", to_frame(ROWS), {}, accuracies)
    header = (settings.out_dir / "results.csv").read_text().splitlines()[0]
    assert header == (
        "strategy,seed,round,device,accuracy_before,accuracy_after,"
        "bytes_down,bytes_up,modules,seconds"
    )
    written = json.loads((settings.out_dir / "summary.json").read_text())
    assert written["strategies"]["eclm"] == summary["strategies"]["eclm"]
    assert written["config"]["devices"] == settings.devices
    assert (settings.out_dir / "accuracy.png").stat().st_size > 10_000
    console = Console(record=True, width=80)
    print_table(summary, settings.out_dir, console)
    text = console.export_text()
    assert "90.0% ± 0.0" in text
    assert max(len(line) for line in text.splitlines()[:8]) <= 80
