"""Reports are made from committed rows alone, and say what the rows say."""

import math
import re
import socket
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from simulations.settings import Settings, SettingsError
from simulations.tables.accuracy_block import accuracy_block, best_rival
from simulations.tables.blocks import NOTHING, Block
from simulations.tables.command import run_table
from simulations.tables.cost_block import cost_block
from simulations.tables.definition import read_table
from simulations.tables.paper_block import paper_block
from simulations.tables.report import markdown, read_all, table_on, with_table
from simulations.tables.rows import Rows, identity, write_rows
from simulations.tables.summary_block import summary_block

OWN = """
title = "Own"
print = ["accuracy", "cost"]
[options]
seeds = "0,1"
strategies = "fedavg,nested,random,eclm,eclm-half"
[[row]]
name = "first"
title = "The first row"
[[row]]
name = "second"
title = "The second row"
[[difference]]
title = "first, not second"
of = "first/eclm"
minus = "second/nested"
paper = 1.25
"""
ACCURACY = {"fedavg": 0.9, "nested": 0.6, "random": 0.5, "eclm": 0.7, "eclm-half": 0.69}


def rows_of(
    accuracy: dict[str, float],
    *,
    held: float = math.nan,
    fallback: float = math.nan,
    masked: float = 0.0,
) -> Rows:
    """Results of two seeds with four devices each; device d is 0.01 d better, in every method."""
    ends, course = [], []
    for strategy, mean in accuracy.items():
        for seed in (0, 1):
            for device in range(4):
                ends.append(
                    {
                        "strategy": strategy, "seed": seed, "device": device, "sent": mean - 0.1,
                        "adapted": mean + 0.01 * device, "masked": 1 - mean + masked,
                        "memory": 2_000_000, "seconds": 0.5, "held": held,
                        "fallback": fallback,
                    }
                )  # fmt: skip
            for r in (0, 1):
                course.append(
                    {
                        "strategy": strategy, "seed": seed, "step": 0, "round": r, "sent": mean * r,
                        "adapted": mean, "bytes": r * mean * 1e7, "clock": float(r),
                    }
                )  # fmt: skip
    settings = identity(Settings(strategies=("eclm",)))
    return Rows(ends=pd.DataFrame(ends), course=pd.DataFrame(course), settings=settings)


def cells(block: Block, name: str) -> list[str]:
    (line,) = [line for line in block.lines if line[0].startswith(f"`{name}`")]
    return line


def test_the_best_rival_within_budgets_is_marked():
    rows = rows_of(ACCURACY)
    block = accuracy_block("x", rows, list(ACCURACY), "eclm")
    assert block.headings[-2:] == ("`eclm` − it, adapted", "masked")  # noqa: RUF001
    assert cells(block, "nested")[2] == "**61.5**"
    assert cells(block, "nested")[-2] == "**+10.0 ± 0.0 (2/2)**"
    assert cells(block, "random")[-2] == "+20.0 ± 0.0 (2/2)"
    assert cells(block, "random")[-1] == "**-20.0 ± 0.0 (2/2)**"  # another is best, masked
    assert cells(block, "fedavg")[0] == "`fedavg` †"  # better, and ignores budgets
    assert cells(block, "fedavg")[-2] == "-20.0 ± 0.0 (2/2)"
    assert cells(block, "eclm")[-2:] == ["", ""]
    assert cells(block, "eclm")[4] == "70.0"  # the worst device
    assert cells(block, "eclm")[5:8] == ["7", "1", "2"]  # MB, seconds, peak MB
    assert "2 seeds, 8 devices in all." in block.notes
    assert best_rival(rows.ends, ["fedavg", "eclm", "eclm-half"], "eclm", "adapted") is None


def test_shifts_have_a_column_where_there_are_any():
    assert "after shift" not in accuracy_block("x", rows_of(ACCURACY), ["eclm"], "eclm").headings
    block = accuracy_block("x", rows_of(ACCURACY, held=0.4), ["eclm", "nested"], "eclm")
    assert cells(block, "eclm")[block.headings.index("after shift")] == "40.0"
    assert "with fall-back" not in block.headings
    rows = rows_of(ACCURACY, held=0.4, fallback=0.6)
    block = accuracy_block("x", rows, ["eclm", "nested"], "eclm")
    assert cells(block, "eclm")[block.headings.index("with fall-back")] == "60.0"


def test_a_summary_finds_the_best_rival_of_each_measure(table):
    rows = {"first": rows_of(ACCURACY, held=0.4), "second": Rows()}
    ends = rows["first"].ends
    ends.loc[(ends["strategy"] == "nested") & (ends["device"] == 0), "adapted"] = 0.3
    block = summary_block(table, rows)
    (line,) = block.lines  # the second row has no results
    ahead = dict(zip(block.headings, line, strict=True))
    assert ahead["row"] == "The first row"
    assert ahead["`eclm`, adapted"] == "71.5"
    assert ahead["sent"] == "+10.0 ± 0.0 (2/2), `nested`"
    assert ahead["adapted"] == "+17.5 ± 11.6 (2/2), `nested`"
    assert ahead["masked"] == "-20.0 ± 0.0 (2/2), `random`"
    assert ahead["after shift"] == "+0.0 ± 0.0 (0/2), `nested`"
    assert "with fall-back" not in ahead
    assert ahead["worst tenth"] == "+20.0, `random`"  # nested: best on average, not there


def test_a_summary_has_no_best_rival_until_all_rivals_are_measured(table):
    rows = {"first": rows_of(ACCURACY, fallback=0.4), "second": rows_of(ACCURACY)}
    ends = rows["first"].ends

    def with_fallback() -> list[str]:
        block = summary_block(table, rows)
        return [line[block.headings.index("with fall-back")] for line in block.lines]

    assert with_fallback() == ["+0.0 ± 0.0 (0/2), `nested`", NOTHING]
    ends.loc[ends["strategy"] == "random", "fallback"] = math.nan
    assert with_fallback() == [NOTHING, NOTHING]


def test_a_summary_leaves_out_rows_without_a_rival(table):
    rows = {"first": rows_of({"eclm": 0.7, "eclm-half": 0.6, "fedavg": 0.5}), "second": Rows()}
    assert not summary_block(table, rows).lines


def test_missing_seeds_are_told():
    rows = rows_of(ACCURACY)
    rows.ends = rows.ends[(rows.ends["strategy"] != "nested") | (rows.ends["seed"] == 0)]
    block = accuracy_block("x", rows, list(ACCURACY), "eclm")
    assert "Fewer seeds so far: `nested` (1)." in block.notes[0]


def test_the_papers_figures_stand_beside_ours_each_measured_as_there():
    ours = {"no-adaptation": 0.5, "local-adaptation": 0.8, "fedavg": 0.6, "eclm": 0.7}
    block = paper_block("x", rows_of(ours), "CIFAR-10, ResNet18, m=2", "eclm")
    assert cells(block, "fedavg") == [
        "`fedavg`", "sent", "73.68", "50.0", "+17.18", "+21.5 ± 1.0 (2/2)"
    ]  # fmt: skip
    assert cells(block, "local-adaptation")[1:4] == ["adapted", "84.19", "81.5"]
    assert "5 of 6 pairs" in block.notes[0]


def test_costs_are_those_until_fedavg_was_best():
    rows = rows_of({"fedavg": 0.6, "eclm": 0.6, "nested": 0.5, "local-adaptation": 0.9})
    rows.course.loc[rows.course["strategy"] == "eclm", "bytes"] /= 4
    slow = rows.ends["strategy"] == "local-adaptation"
    rows.ends.loc[slow, "seconds"] *= 6
    block = cost_block("x", rows, ["fedavg", "eclm", "nested", "local-adaptation"])
    assert cells(block, "eclm")[1:4] == ["60.0", "1.5 (2/2)", "4.00x"]
    assert cells(block, "nested")[1:4] == ["50.0", "never", "–"]  # noqa: RUF001
    assert cells(block, "local-adaptation")[2:6] == ["–"] * 4  # noqa: RUF001
    assert cells(block, "eclm")[-3] == "6.00x"


@pytest.fixture
def table(tmp_path: Path):
    (tmp_path / "own.toml").write_text(OWN)
    return read_table(str(tmp_path / "own.toml"))


def test_what_there_is_is_printed_and_what_not_is_named(table):
    assert markdown(table, read_all(table)) == ""
    write_rows(rows_of(ACCURACY), table.results, "first")
    text = markdown(table, read_all(table))
    assert "#### The first row\n\n| strategy | sent |" in text
    assert "Not run yet: The second row." in text
    assert "Differences" not in text
    lower = {name: value - 0.1 for name, value in ACCURACY.items()}
    write_rows(rows_of(lower), table.results, "second")
    text = markdown(table, read_all(table))
    assert "| first, not second | 71.5 | 51.5 | +20.0 ± 0.0 (2/2) |" in text
    assert "| +1.25 |" in text
    assert "Not run yet" not in text


def test_a_report_needs_rows_alone_and_finds_its_place(table, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("simulations.tables.command.TableRun", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("looked for data"))
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- table own -->\n<!-- end of table own -->\n\nThe end.\n")
    options = {"data_dir": "", "jobs": 1, "runs": tmp_path, "tune": False, "redo": ""}
    path = str(tmp_path / "own.toml")
    run_table(path, report=True, page=str(page), **options)
    assert "There are no rows of table own yet." in capsys.readouterr().out
    write_rows(rows_of(ACCURACY), table.results, "first")
    for _ in range(2):
        run_table(path, report=True, page=str(page), **options)
        text = markdown(table, read_all(table))
        assert (table.results / "table.md").read_text() == text
        assert table_on(page.read_text(), "own") == text.strip()
        assert page.read_text().startswith("# Page\n")
        assert page.read_text().endswith("\nThe end.\n")
    assert "The first row" in capsys.readouterr().out


def test_a_page_without_a_place_is_refused():
    with pytest.raises(SettingsError, match="a line <!-- table own -->"):
        with_table("# Page", "own", "text")


def test_cells_of_markdown_are_as_many_as_headings(table):
    write_rows(rows_of(ACCURACY), table.results, "first")
    for block in markdown(table, read_all(table)).split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"\|", line)) for line in block.splitlines()}) == 1


def test_the_terminal_gets_the_same_cells(table):
    console = Console(width=200, record=True)
    console.print(accuracy_block("x", rows_of(ACCURACY), list(ACCURACY), "eclm").terminal())
    assert "+10.0 ± 0.0 (2/2)" in console.export_text()
    assert "**" not in console.export_text()
