"""The driver of the paper-scale run, on handwritten digits: what is done is kept."""

import pandas as pd
import pytest
from rich.console import Console

from benchmarks import paper_scale
from benchmarks.paper_scale import PAPER, STRATEGIES, run_all, table_of, works_of
from simulations.presets import read_preset
from strategies import METHODS

TINY = {
    "dataset": "digits",
    "devices": 6,
    "per_round": 2,
    "rounds": 1,
    "evaluated": 3,
    "epochs": 2,
    "enhancing_epochs": 1,
}
CASE = "paper-cifar10"


def test_all_of_the_papers_strategies_are_run_once():
    strategies = sorted(STRATEGIES.replace(":", ",").split(","))
    assert set(strategies) <= set(METHODS)
    for case, figures in PAPER.items():
        assert sorted(figures) == strategies
        assert read_preset(case)["devices"] == 500


@pytest.mark.timeout(600)
def test_strategies_start_from_one_whole_model_and_leave_rows(tmp_path):
    mine = works_of(CASE, TINY, {}, tmp_path, "no-adaptation:eclm")
    table = run_all(mine, tmp_path, seconds=550)
    assert list(table["strategy"]) == ["no-adaptation", "eclm"]
    assert list(table["paper"]) == [73.55, 90.86]
    logs = "".join(work.log.read_text() for work in mine)
    assert logs.count("training the whole model") == 1
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert rows.groupby("strategy").size().to_dict() == {"eclm": 3, "no-adaptation": 3}
    assert pd.read_csv(tmp_path / "table.csv")["bytes_down"].iloc[1] > 0
    console = Console(width=120)
    with console.capture() as printed:
        console.print(table_of(table))
    assert "90.86" in printed.get()


@pytest.mark.parametrize("seconds", [200, 4])
def test_what_fails_or_takes_too_long_is_dropped(tmp_path, seconds):
    """Either there is no data, or no time for anything."""
    mine = works_of(CASE, TINY, {}, tmp_path, "no-adaptation:eclm")
    if seconds == 200:
        for work in mine:
            work.settings = paper_scale.replace(work.settings, dataset="cifar10", data_dir="/no")
    assert not len(run_all(mine, tmp_path, seconds=seconds))
    assert not any(work.running for work in mine)
    assert not (tmp_path / "table.csv").exists()
