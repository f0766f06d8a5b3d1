"""Differences between results of a table, which may be of two rows: its ablations."""

from __future__ import annotations

from collections.abc import Mapping

from simulations.statistics import difference, of_strategy
from simulations.tables.blocks import NOTHING, Block, percent, points
from simulations.tables.definition import TableDefinition
from simulations.tables.rows import Rows


def difference_block(table: TableDefinition, rows: Mapping[str, Rows]) -> Block:
    """Build the block of a table's differences; those without results are left out.

    Devices are paired by seed and number; rows of the same data set, seed and number of devices
    have the same data on them.
    """
    block = Block(
        title="Differences",
        headings=("what", "of", "minus", "adapted", "masked", "paper"),
    )
    for given in table.differences:
        (row, strategy), (other_row, other) = given.of, given.minus
        sides = [rows[row].ends, rows[other_row].ends]
        there = [
            len(ends) > 0 and name in set(ends["strategy"])
            for ends, name in zip(sides, (strategy, other), strict=True)
        ]
        if not all(there):
            continue
        cells = [given.title]
        for ends, name in zip(sides, (strategy, other), strict=True):
            cells.append(percent(of_strategy(ends, name, "adapted").mean()))
        for column in ("adapted", "masked"):
            values = (of_strategy(sides[0], strategy, column), of_strategy(sides[1], other, column))
            cells.append(points(difference(*values)))
        cells.append(NOTHING if given.paper is None else f"{given.paper:+.2f}")
        block.lines.append(cells)
    block.notes.append("Accuracy after adaptation; differences in points, paired by device.")
    return block
