"""Tuned learning rates of a table's rows: where they lie, and what a variant of a method takes.

``--tune`` tunes once for each row that others name as ``tuned``, on that row's options, and leaves
``rates/<row>.toml`` and ``.csv`` beside the table's rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pandas as pd
from rich.console import Console

from simulations.settings import SettingsError, read_rates
from simulations.tables.definition import RESULTS, TableDefinition, TableRow
from simulations.trials import SEEDS, TRIALS

Rates = tuple[tuple[str, float], ...]


def rates_of(table: TableDefinition, row: TableRow) -> Rates:
    """Return the learning rates of a row's strategies; none where nothing was tuned for it.

    A variant of the method (``eclm-half`` of ``eclm``) has the method's rate if it has none of its
    own: it was given no trials that the method had not.

    Raises
    ------
    SettingsError
        They were not tuned yet, or not for all of its strategies.
    """
    if not row.tuned:
        return ()
    path = rates_file(table, row.tuned)
    if not path.exists():
        raise SettingsError(
            f"Expected tuned learning rates for the row {row.name} of table {table.name} in {path},"
            f" but there is no such file; run python -m simulations table "
            f"{row.tuned.split('/')[0] if '/' in row.tuned else table.name} --tune."
        )
    known = dict(read_rates(path))
    rates = []
    for strategy in row.settings().strategies:
        own = strategy
        if own not in known and strategy.startswith(f"{table.method}-"):
            own = table.method
        if own not in known:
            raise SettingsError(
                f"Expected a learning rate for {strategy} in {path}, got {', '.join(known)}; tune "
                "with it among the strategies."
            )
        rates.append((strategy, known[own]))
    return tuple(sorted(rates))


def rates_file(table: TableDefinition, tuned: str) -> Path:
    """Return where the rates tuned on a row lie, ``row`` of this table or ``table/row``."""
    if "/" not in tuned:
        return table.results / "rates" / f"{tuned}.toml"
    other, row = tuned.split("/", 1)
    return RESULTS / other / "rates" / f"{row}.toml"


def tune_rows(
    table: TableDefinition,
    runs: Path,
    console: Console,
    *,
    trials: tuple[float, ...] = TRIALS,
    redo: Collection[str] = (),
    only: Collection[str] = (),
) -> None:
    """Tune, for every row that one of this table's rows names, what isn't tuned yet.

    Parameters
    ----------
    redo : collection of str
        Strategies that are tuned anew; what others came to is kept.
    only : collection of str
        Names of the rows to tune on; empty: all.
    """
    from simulations.tuning import tune

    names = dict.fromkeys(row.tuned for row in table.rows if row.tuned and "/" not in row.tuned)
    for name in [name for name in names if name in only or not only]:
        path, out = rates_file(table, name), runs / table.name / "tuning" / name
        settings = table.row(name).settings(
            seeds=SEEDS, out=str(out), offline_dir=str(runs / "offline")
        )
        known = None
        if path.exists():
            rated = dict(read_rates(path)).keys() - set(redo)
            anew = tuple(strategy for strategy in settings.strategies if strategy not in rated)
            if not anew:
                console.print(f"{path.name}: tuned already.")
                continue
            known = pd.read_csv(path.with_suffix(".csv"))
            known = known[~known["strategy"].isin(anew)]
            settings = replace(settings, strategies=anew, out=f"{out}-anew")
            shutil.rmtree(settings.out, ignore_errors=True)
        command = f"python -m simulations table {table.name} --tune   # its row {name}"
        tune(settings, trials, path, command=command, console=console, known=known)
