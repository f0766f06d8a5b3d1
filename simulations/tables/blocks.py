"""Blocks of a report: cells with a heading, as Markdown and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from simulations.statistics import Estimate

NOTHING = "–"  # noqa: RUF001 - an empty cell


@dataclass(kw_only=True)
class Block:
    """One table with what stands around it.

    Attributes
    ----------
    title : str
    headings : tuple[str, ...]
        The first column is text, the others are numbers.
    lines : list of list of str
        Cells; ``**...**`` is bold, `` `...` `` a name.
    notes : list of str
        Sentences after the cells.
    """

    title: str
    headings: tuple[str, ...] = ()
    lines: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self, *, level: int = 4) -> str:
        """Write the block with a heading of a level."""
        parts = [f"{'#' * level} {self.title}"]
        if self.lines:
            rule = ["---", *["--:"] * (len(self.headings) - 1)]
            parts.append("\n".join(_line(cells) for cells in [self.headings, rule, *self.lines]))
        return "\n\n".join([*parts, *self.notes])

    def terminal(self) -> Table:
        """Build the block for `rich`."""
        table = Table(title=self.title, box=box.SIMPLE_HEAD, caption=" ".join(self.notes))
        for number, heading in enumerate(self.headings):
            table.add_column(heading.replace("`", ""), justify="right" if number else "left")
        for cells in self.lines:
            table.add_row(*map(_rich, cells))
        return table


def percent(value: float) -> str:
    """Write an accuracy from 0 to 1 in per cent."""
    return NOTHING if math.isnan(value) else f"{value:.1%}".removesuffix("%")


def points(value: Estimate) -> str:
    """Write a difference of accuracies in points, with interval and seeds that agree in sign."""
    if not value.number:
        return NOTHING
    half = "?" if math.isinf(value.half_width) else f"{value.half_width * 100:.1f}"
    return f"{value.mean * 100:+.1f} ± {half} ({value.agreeing}/{value.seeds})"


def number(value: float, *, scale: float = 1.0) -> str:
    """Write an amount with three digits."""
    return NOTHING if math.isnan(value) else f"{value / scale:.3g}"


def ratio(value: float) -> str:
    """Write a factor."""
    return NOTHING if math.isnan(value) else f"{value:.2f}x"


def bold(text: str, *, when: bool = True) -> str:
    """Mark a cell."""
    return f"**{text}**" if when and text != NOTHING else text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rich(cell: str) -> str:
    text = cell.replace("`", "")
    return f"[bold]{text.strip('*')}[/]" if text.startswith("**") else text
