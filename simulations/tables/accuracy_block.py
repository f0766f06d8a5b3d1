"""How good each method of a row is, and by how much the method of the table is better."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from simulations.statistics import difference, of_strategy, worst_tenth
from simulations.tables.blocks import Block, bold, number, percent, points
from simulations.tables.rows import Rows
from strategies import METHODS


def accuracy_block(title: str, rows: Rows, order: list[str], method: str) -> Block:
    """Build the block of one row.

    Parameters
    ----------
    title : str
    rows : Rows
    order : list of str
        Strategies, as the row's definition names them; those without results are left out.
    method : str
        What the others are compared with.
    """
    there = [name for name in order if name in set(rows.ends["strategy"])]
    shifts = {c: h for c, h in AFTER_SHIFT.items() if rows.ends[c].notna().any()}
    best = {column: best_rival(rows.ends, there, method, column) for column in _JUDGED}
    headings = ["strategy", "sent", "adapted", "masked", "worst tenth"]
    headings += shifts.values()
    headings += ["MB", "s", "peak MB"]
    if method in there:
        headings += [f"`{method}` − it, adapted", "masked"]  # noqa: RUF001 - a minus
    block = Block(title=title, headings=tuple(headings))
    for name in there:
        own = {c: of_strategy(rows.ends, name, c) for c in ("sent", *_JUDGED, *shifts, "memory")}
        cells = [label(name), percent(own["sent"].mean())]
        for column in _JUDGED:
            cells.append(bold(percent(own[column].mean()), when=best[column] == name))
        cells.append(percent(worst_tenth(own["adapted"])))
        cells += [percent(own[column].mean()) for column in shifts]
        cells.append(number(at_the_end(rows.course, name, "bytes"), scale=1e6))
        cells.append(number(at_the_end(rows.course, name, "clock")))
        cells.append(number(own["memory"].mean(), scale=1e6))
        if method in there:
            for column in _JUDGED:
                above = difference(of_strategy(rows.ends, method, column), own[column])
                cells.append(
                    "" if name == method else bold(points(above), when=best[column] == name)
                )
        block.lines.append(cells)
    block.notes.append(_sentence(rows.ends))
    return block


_JUDGED = ("adapted", "masked")
AFTER_SHIFT = {"held": "after shift", "fallback": "with fall-back"}


def label(name: str) -> str:
    """Write a strategy's name; a dagger marks those that ignore budgets."""
    return f"`{name}`" + ("" if within_budget(name) else " †")


def within_budget(name: str) -> bool:
    """Tell whether devices of a strategy train what fits their budgets."""
    return METHODS[name].offline != "whole"


def best_rival(
    ends: pd.DataFrame,
    there: list[str],
    method: str,
    column: str,
    *,
    statistic: Callable[[pd.Series[float]], float] = pd.Series.mean,
) -> str | None:
    """Return the best strategy within budgets that is neither the method nor a variant of it.

    None if there is no such strategy, or one of them was not measured.
    """
    values = {
        name: statistic(of_strategy(ends, name, column))
        for name in there
        if name != method and not name.startswith(f"{method}-") and within_budget(name)
    }
    if not values or any(math.isnan(value) for value in values.values()):
        return None
    return max(values, key=lambda name: values[name])


def at_the_end(course: pd.DataFrame, name: str, column: str) -> float:
    """Return what a strategy spent in all, mean over seeds."""
    own = course[course["strategy"] == name]
    return float(own.groupby("seed")[column].max().mean()) if len(own) else math.nan


def _sentence(ends: pd.DataFrame) -> str:
    by_strategy = ends.groupby("strategy")["seed"].agg(["nunique", "size"])
    seeds, devices = by_strategy["nunique"].max(), by_strategy["size"].max()
    text = f"{seeds} seeds, {devices} devices in all."
    short = by_strategy[by_strategy["nunique"] < seeds]
    if len(short):
        names = ", ".join(f"`{name}` ({n})" for name, n in short["nunique"].items())
        text += f" Fewer seeds so far: {names}."
    return text
