"""What stands on the page of evidence is what the committed rows say."""

from pathlib import Path

import pytest

from simulations.tables.definition import RESULTS, known_tables, read_table
from simulations.tables.report import MARKDOWN, markdown, read_all, table_on
from simulations.trials import TRIALS

PAGE = Path(__file__).parents[3] / "docs" / "evidence.md"
MOST = 900_000  # bytes


@pytest.mark.parametrize("name", known_tables())
def test_tables_on_the_page_are_those_of_the_rows(name: str):
    table = read_table(name)
    text = markdown(table, read_all(table))
    assert f"<!-- table {name} -->" in PAGE.read_text()
    assert table_on(PAGE.read_text(), name) == text.strip()
    if text:
        assert (table.results / MARKDOWN).read_text() == text


@pytest.mark.parametrize("name", known_tables())
def test_committed_rows_are_small_and_of_the_table_as_it_is_defined(name: str):
    table = read_table(name)
    assert sum(file.stat().st_size for file in table.results.rglob("*.csv")) < MOST
    for row in table.rows:
        rows = read_all(table)[row.name]
        settings = row.settings(rates=tuple(sorted(rows.rates.items())))
        rows.check(settings, table.results / row.name)
        assert {strategy for strategy, _ in rows.done} <= set(settings.strategies)


def test_the_page_tells_the_trials_and_every_table():
    text = " ".join(PAGE.read_text().split())
    assert f"{TRIALS[0]}, {TRIALS[1]} and {TRIALS[2]}" in text
    assert all(f"tables/{name}.toml" in text for name in known_tables())
    assert RESULTS.is_dir() or all(not table_on(text, name) for name in known_tables())
