"""A table at a glance: of each row, by how much the method is ahead of the best rival."""

from __future__ import annotations

from collections.abc import Mapping

from simulations.statistics import difference, of_strategy, worst_tenth
from simulations.tables.accuracy_block import AFTER_SHIFT, best_rival
from simulations.tables.blocks import NOTHING, Block, percent, points
from simulations.tables.definition import TableDefinition
from simulations.tables.rows import Rows

_MEASURES = {"sent": "sent", "adapted": "adapted", "masked": "masked"}
_NOTE = (
    "Each cell: points ahead of the best rival within budgets *of that cell*, and which it is. "
    "Variants of the method, and strategies that ignore budgets (†), are no rivals here."
)


def summary_block(table: TableDefinition, rows: Mapping[str, Rows]) -> Block:
    """Build the block of a table; rows without results, or without a rival, are left out.

    Each measure has a best rival of its own: the one that leaves the method least.
    """
    method = table.method
    measures = _MEASURES | {
        column: heading
        for column, heading in AFTER_SHIFT.items()
        if any(len(found.ends) and found.ends[column].notna().any() for found in rows.values())
    }
    block = Block(
        title=f"At a glance: `{method}` against the best rival within budgets",
        headings=("row", f"`{method}`, adapted", *measures.values(), "worst tenth"),
        notes=[_NOTE],
    )
    for row in table.rows:
        ends = rows[row.name].ends
        there = [] if ends.empty else list(ends["strategy"].unique())
        rival_there = best_rival(ends, there, method, "adapted", statistic=worst_tenth)
        if method not in there or rival_there is None:
            continue
        own = of_strategy(ends, method, "adapted")
        cells = [row.title, percent(own.mean())]
        for column in measures:
            rival = best_rival(ends, there, method, column)
            mine, theirs = (of_strategy(ends, name, column) for name in (method, str(rival)))
            ahead = points(difference(mine, theirs))
            cells.append(ahead if ahead == NOTHING else f"{ahead}, `{rival}`")
        worst = worst_tenth(own) - worst_tenth(of_strategy(ends, rival_there, "adapted"))
        cells.append(f"{100 * worst:+.1f}, `{rival_there}`")
        block.lines.append(cells)
    return block
