"""Tables that come along are sound; a user's own are read with care."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from simulations.settings import SettingsError
from simulations.tables.definition import (
    FOLDER,
    RESULTS,
    TableRow,
    known_tables,
    read_table,
)
from simulations.tables.paper_block import paper_row
from simulations.tables.rates import rates_file

OWN = """
title = "Own"
print = ["cost"]
[options]
seeds = "0,1"
strategies = ["eclm", "fedavg"]
devices = 6
per-round = 3
[options-of.digits]
rounds = 4
tuned = "small"
[[row]]
name = "small"
dataset = "digits"
[[row]]
name = "large"
dataset = "digits"
preset = "digits-small"
rounds = 5
tuned = "other/row"
[[difference]]
of = "small/eclm"
minus = "large/fedavg"
"""


def table_of(tmp_path: Path, text: str):
    (tmp_path / "own.toml").write_text(text)
    return read_table(str(tmp_path / "own.toml"))


@pytest.mark.parametrize("name", known_tables())
def test_every_table_is_sound(name: str):
    table = read_table(name, data_dir="/data")
    text = (FOLDER / f"{name}.toml").read_text()
    assert text.startswith("# ")
    assert tomllib.loads(text)["options"]["seeds"] == "0,1,2"
    for row in table.rows:
        settings = row.settings()
        assert settings.seeds in ((0, 1, 2), (0, 1, 2, 3, 4))  # five where a run is short
        assert settings.data_dir == "/data"
        assert settings.judged_on == "test"
        if row.paper:
            assert set(paper_row(row.paper)) <= set(settings.strategies)
        if row.tuned:
            known, tuned = row.tuned.split("/") if "/" in row.tuned else (name, row.tuned)
            tuning = read_table(known).row(tuned).settings()
            assert tuning.dataset == settings.dataset
            rated = set(tuning.strategies)
            assert all(s in rated or s.startswith("eclm-") for s in settings.strategies)


def test_there_is_a_table_for_each_question():
    assert known_tables() == ["ablations", "cost", "honest", "paper", "variations"]
    honest = read_table("honest")
    line_up = {row.settings().strategies for row in honest.rows}
    assert [(names[0], len(names)) for names in line_up] == [("eclm", 12)]  # all rows alike
    assert all(row.tuned for row in honest.rows)


@pytest.mark.parametrize("row", read_table("variations").rows, ids=lambda row: row.name)
def test_a_variation_is_a_row_of_table_b_with_one_thing_changed(row: TableRow):
    same_row, _, change = row.name.rpartition("-")
    own, same = row.settings(), read_table("honest").row(same_row).settings()
    changes = {
        "longer": {"enhancing_epochs": 3 * same.enhancing_epochs},
        "prior": {"class_prior": True},
        "masked": {"masked_loss": True},
        "epochs": {"local_epochs": 10},
    }
    free = {"strategies": own.strategies, "rates": own.rates, "distillation": own.distillation}
    assert own == replace(same, **free, **changes[change])
    assert set(own.strategies) <= set(same.strategies)


def test_options_come_from_preset_table_data_set_and_row(tmp_path: Path):
    table = table_of(tmp_path, OWN)
    small, large = (table.row(name).settings() for name in ("small", "large"))
    assert (small.rounds, large.rounds) == (4, 5)
    assert (small.devices, large.devices) == (6, 6)  # not the preset's 12
    assert (small.evaluate_every, large.evaluate_every) == (1, 4)  # the preset's
    assert small.strategies == large.strategies == ("eclm", "fedavg")
    assert [row.tuned for row in table.rows] == ["small", "other/row"]
    assert table.results == tmp_path / "own"
    assert rates_file(table, "small") == tmp_path / "own" / "rates" / "small.toml"
    assert rates_file(table, "other/row") == RESULTS / "other" / "rates" / "row.toml"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "large"', 'name = "small"', "rows of different names"),
        ('name = "large"', 'name = "Large one"', "small letters, digits, dots and dashes"),
        ("rounds = 5", "ruonds = 5", "the row large of .*got ruonds"),
        ("rounds = 5", "per-round = 50", "In the row large .*: Expected --per-round of at most"),
        ("rounds = 5", 'rates = "x.toml"', "got rates"),
        ("rounds = 5", 'strategies = "fedprox"', "Expected --strategies from eclm"),
        ('["cost"]', '["costs"]', "print from accuracy, paper, cost, summary"),
        ('title = "Own"', "seeds = 3", "got seeds; options of all rows stand under"),
        ("small/eclm", "small/nested", "a strategy of row small in .*, got nested"),
        ("small/eclm", "tiny/eclm", "a row of table own from small, large, got 'tiny'"),
        ("small/eclm", "small", "'of' and 'minus' as row/strategy"),
        ('title = "Own"', 'method = "best"', "Expected method from eclm"),
        ('title = "Own"', "title Own", "Can't read the table"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, old: str, new: str, said: str):
    assert old in OWN
    with pytest.raises(SettingsError, match=said):
        table_of(tmp_path, OWN.replace(old, new, 1))


def test_an_unknown_table_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match=r"a table from ablations, .*variations, or the path"):
        read_table("z")
    with pytest.raises(SettingsError, match=r"a row of the paper's table from HAR, MLP"):
        paper_row("MNIST")
