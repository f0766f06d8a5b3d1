"""Tuned learning rates of a table's rows: where they lie, and what a variant of a method takes.

``--tune`` tunes once for each row that others name as ``tuned``, on that row's options, and leaves
``rates/<row>.toml`` and ``.csv`` beside the table's rows.
"""

from __future__ import annotations

from pathlib import Path

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
    table: TableDefinition, runs: Path, console: Console, *, trials: tuple[float, ...] = TRIALS
) -> None:
    """Tune for every row of this table that one of its rows names, if it isn't done yet."""
    from simulations.tuning import tune

    names = dict.fromkeys(row.tuned for row in table.rows if row.tuned and "/" not in row.tuned)
    for name in names:
        path = rates_file(table, name)
        if path.exists():
            console.print(f"{path.name}: tuned already.")
            continue
        settings = table.row(name).settings(
            seeds=SEEDS,
            out=str(runs / table.name / "tuning" / name),
            offline_dir=str(runs / "offline"),
        )
        command = f"python -m simulations table {table.name} --tune   # its row {name}"
        tune(settings, trials, path, command=command, console=console)
