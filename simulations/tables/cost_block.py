"""What each method of a row spent until it was as good as FedAvg, and what an adaptation takes."""

from __future__ import annotations

import math

import pandas as pd

from simulations.statistics import of_strategy
from simulations.summary import REFERENCE
from simulations.tables.blocks import NOTHING, Block, number, percent, ratio
from simulations.tables.reaching import Reached, reached
from simulations.tables.rows import Rows
from strategies import METHODS

WHOLE = "local-adaptation"  #: what a device's adaptation is measured against


def cost_block(title: str, rows: Rows, order: list[str]) -> Block:
    """Build the block of one row.

    Parameters
    ----------
    title : str
    rows : Rows
    order : list of str
        Strategies, as the row's definition names them; those without results are left out.
    """
    there = [name for name in order if name in set(rows.ends["strategy"])]
    headings = ["strategy"]
    for accuracy in ("sent", "adapted"):
        headings += [f"best, {accuracy}", f"MB to {REFERENCE}'s best", "fewer", "s to it", "faster"]
    headings += ["s to adapt", f"{WHOLE} / it", "peak MB", f"{WHOLE} / it"]
    block = Block(title=f"{title}: costs", headings=tuple(headings))
    for name in there:
        cells = [f"`{name}`"]
        own = rows.course[rows.course["strategy"] == name]
        for accuracy in ("sent", "adapted"):
            cells.append(percent(own.groupby("seed")[accuracy].max().mean()))
            if not METHODS[name].federated:  # it has no rounds to spend anything in
                cells += [NOTHING] * 4
                continue
            for spent, scale in (("bytes", 1e6), ("clock", 1.0)):
                there_at = reached(rows.course, name, accuracy=accuracy, spent=spent)
                cells += [_amount(there_at, scale), ratio(there_at.ratio)]
        for column, scale in (("seconds", 1.0), ("memory", 1e6)):
            cells.append(number(of_strategy(rows.ends, name, column).mean(), scale=scale))
            cells.append(ratio(_whole_over(rows.ends, name, column)))
        block.lines.append(cells)
    block.notes.append(
        "Best: of the mean over devices, over all rounds, mean over seeds. MB and s to "
        f"{REFERENCE}'s best: mean over the seeds that reach it, in brackets how many do. Fewer "
        f"and faster: what {REFERENCE} spent, over it, geometric mean; {NOTHING} where {REFERENCE} "
        f"was never better than at the start. {WHOLE} / it: mean of the devices' ratios."
    )
    return block


def _amount(there: Reached, scale: float) -> str:
    if not there.reached:
        return "never"
    how_many = f"({there.reached}/{there.seeds})"
    if there.at_start == there.reached:
        return f"{number(there.spent, scale=scale)}, at the start {how_many}"
    return f"{number(there.spent, scale=scale)} {how_many}"


def _whole_over(ends: pd.DataFrame, name: str, column: str) -> float:
    """Return the mean over devices of what local adaptation of the whole model takes, over it."""
    ratios = (of_strategy(ends, WHOLE, column) / of_strategy(ends, name, column)).dropna()
    finite = ratios[ratios.map(math.isfinite)]
    return float(finite.mean()) if len(finite) else math.nan
