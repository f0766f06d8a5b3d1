"""The report of a table, from its committed rows alone: Markdown, and the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from simulations.results import replace_file
from simulations.settings import SettingsError
from simulations.tables.accuracy_block import accuracy_block
from simulations.tables.blocks import Block
from simulations.tables.cost_block import cost_block
from simulations.tables.definition import TableDefinition
from simulations.tables.difference_block import difference_block
from simulations.tables.paper_block import paper_block
from simulations.tables.rows import Rows, read_rows
from simulations.tables.summary_block import summary_block

MARKDOWN = "table.md"


def read_all(table: TableDefinition) -> dict[str, Rows]:
    """Read the committed rows of a table."""
    return {row.name: read_rows(table.results, row.name) for row in table.rows}


def blocks_of(table: TableDefinition, rows: Mapping[str, Rows]) -> list[Block]:
    """Build all blocks of which there are results."""
    blocks = []
    if "summary" in table.blocks and (glance := summary_block(table, rows)).lines:
        blocks.append(glance)
    for row in table.rows:
        own = rows[row.name]
        if own.ends.empty:
            continue
        order = list(row.settings().strategies)
        if "paper" in table.blocks and row.paper:
            blocks.append(paper_block(row.title, own, row.paper, table.method))
        if "accuracy" in table.blocks:
            blocks.append(accuracy_block(row.title, own, order, table.method))
        if "cost" in table.blocks:
            blocks.append(cost_block(row.title, own, order))
    if table.differences and (block := difference_block(table, rows)).lines:
        blocks.append(block)
    return blocks


def markdown(table: TableDefinition, rows: Mapping[str, Rows]) -> str:
    """Write a table's report; nothing without results."""
    blocks = blocks_of(table, rows)
    if not blocks:
        return ""
    missing = [row.title for row in table.rows if rows[row.name].ends.empty]
    parts = [block.markdown() for block in blocks]
    if missing:
        parts.append(f"Not run yet: {'; '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def write_report(table: TableDefinition, console: Console, *, page: Path | None = None) -> str:
    """Print the report, write it beside the rows and, if there is one, into its place on a page.

    Returns
    -------
    str
        The Markdown.
    """
    rows = read_all(table)
    for block in blocks_of(table, rows):
        console.print(block.terminal())
    text = markdown(table, rows)
    if not text:
        console.print(f"There are no rows of table {table.name} yet.")
        return text
    table.results.mkdir(parents=True, exist_ok=True)
    replace_file(table.results / MARKDOWN, text)
    console.print(f"Report: {table.results / MARKDOWN}", soft_wrap=True)
    if page is not None:
        replace_file(page, with_table(page.read_text(), table.name, text))
        console.print(f"Table {table.name} of {page} is up to date.", soft_wrap=True)
    return text


def with_table(page: str, name: str, text: str) -> str:
    """Put a table into its place on a page, between two comments.

    Raises
    ------
    SettingsError
        The page has no such place.
    """
    pattern = place_of(name)
    if not pattern.search(page):
        raise SettingsError(
            f"Expected a line <!-- table {name} --> and a line <!-- end of table {name} --> on the "
            "page, got none."
        )
    return pattern.sub(lambda found: f"{found[1]}\n{text.strip()}\n{found[3]}", page)


def table_on(page: str, name: str) -> str:
    """Return what stands in a table's place on a page."""
    found = place_of(name).search(page)
    return found[2].strip() if found else ""


def place_of(name: str) -> re.Pattern[str]:
    """Return a pattern of three groups: a table's first comment, its text, and the last one."""
    escaped = re.escape(name)
    return re.compile(
        rf"(<!-- table {escaped} -->)(.*?)(<!-- end of table {escaped} -->)", re.DOTALL
    )
