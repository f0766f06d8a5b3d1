"""The paper's own figures beside ours, each method measured as the paper does."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from simulations.settings import SettingsError
from simulations.statistics import difference, of_strategy
from simulations.tables.blocks import Block, percent, points
from simulations.tables.rows import Rows

PAPER = Path(__file__).parent / "paper" / "table-1.toml"


@cache
def paper_table() -> dict[str, dict[str, Any]]:
    """Read the paper's table; "measured" says what is measured of each method."""
    return tomllib.loads(PAPER.read_text())


def paper_row(name: str) -> dict[str, float]:
    """Return a row of it: strategy -> accuracy in per cent."""
    table = paper_table()
    if name not in table or name == "measured":
        names = "; ".join(row for row in table if row != "measured")
        raise SettingsError(f"Expected a row of the paper's table from {names}, got '{name}'.")
    return table[name]


def paper_block(title: str, rows: Rows, paper: str, method: str) -> Block:
    """Build the block of one row.

    Parameters
    ----------
    title : str
    rows : Rows
    paper : str
        Row of the paper's table.
    method : str
        What the others are compared with.
    """
    theirs, measured = paper_row(paper), paper_table()["measured"]
    there = [name for name in theirs if name in set(rows.ends["strategy"])]
    ours = {name: of_strategy(rows.ends, name, measured[name]) for name in there}
    minus = f"`{method}` − it"  # noqa: RUF001 - a minus
    block = Block(
        title=f"{title}, as the paper measures ({paper})",
        headings=("strategy", "measured", "paper", "ours", f"{minus}, paper", f"{minus}, ours"),
    )
    for name in there:
        cells = [f"`{name}`", measured[name], f"{theirs[name]:.2f}", percent(ours[name].mean())]
        if name == method or method not in ours:
            cells += ["", ""]
        else:
            margin = theirs[method] - theirs[name]
            cells += [f"{margin:+.2f}", points(difference(ours[method], ours[name]))]
        block.lines.append(cells)
    means = {name: float(values.mean()) for name, values in ours.items()}
    block.notes.append(_order(there, theirs, means))
    return block


def _order(there: list[str], theirs: Mapping[str, float], ours: Mapping[str, float]) -> str:
    by_paper, by_us = (sorted(there, key=lambda name: of[name]) for of in (theirs, ours))
    pairs = list(combinations(there, 2))
    agreeing = sum((theirs[a] - theirs[b]) * (ours[a] - ours[b]) > 0 for a, b in pairs)
    text = f"From worst to best: in the paper {', '.join(by_paper)}; here {', '.join(by_us)}"
    return f"{text}. {agreeing} of {len(pairs)} pairs are in the paper's order."
