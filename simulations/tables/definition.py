"""What a table is: a file that says which runs it needs, and what it prints of them.

::

    title = "..."                # of the table
    print = ["accuracy"]         # blocks of each row, see `BLOCKS`; "summary": of all rows

    [options]                    # of all rows, as in a preset
    seeds = "0,1,2"

    [options-of.cifar10]         # of all rows on a data set
    devices = 30

    [[row]]
    name = "cifar10-m2"          # of its files, and in [[difference]]
    title = "CIFAR-10, two classes a device"
    dataset = "cifar10"          # any option of a run

    [[difference]]               # printed after the rows
    title = "..."
    of = "cifar10-m2/eclm"
    minus = "cifar10-m2/nested"

A row, or options of many, may also have ``preset``, whose options the file's own ones override;
``tuned``, the name of the row (of another table: ``table/row``) whose tuned rates are taken; and
``paper``, the name of a row of the paper's own table.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.presets import read_preset, sound_options
from simulations.server_app import with_known_strategies
from simulations.settings import Settings, SettingsError
from strategies import METHODS

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results" / "tables"
BLOCKS = ("accuracy", "paper", "cost", "summary")
_OF_A_TABLE = {"title", "print", "method", "options", "options-of", "row", "difference"}
_OF_A_ROW = ("name", "title", "preset", "tuned", "paper")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One experiment of a table.

    Attributes
    ----------
    name, title : str
    options : dict[str, Any]
        Of the run, as `Settings.suited` takes them, without learning rates by strategy.
    tuned : str
        ``table/row`` whose tuned rates it takes; empty: the run's learning rate for all.
    paper : str
        Row of the paper's table; empty: none.
    """

    name: str
    title: str
    options: Mapping[str, Any]
    tuned: str = ""
    paper: str = ""

    def settings(self, **more: Any) -> Settings:
        """Return the settings of its run."""
        return with_known_strategies(Settings.suited(**{**self.options, **more}))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two results to compare, device by device: (row, strategy) each."""

    title: str
    of: tuple[str, str]
    minus: tuple[str, str]
    paper: float | None = None


@dataclass(frozen=True, kw_only=True)
class TableDefinition:
    """One table.

    Attributes
    ----------
    name, title : str
    blocks : tuple[str, ...]
        Names in `BLOCKS`: a summary of all rows, and what is printed of each.
    method : str
        What all others are compared with; strategies named ``<method>-...`` are variants of it.
    rows : tuple[TableRow, ...]
    differences : tuple[Difference, ...]
    results : Path
        Folder of its committed rows.
    """

    name: str
    title: str
    blocks: tuple[str, ...]
    method: str
    rows: tuple[TableRow, ...]
    differences: tuple[Difference, ...]
    results: Path

    def row(self, name: str) -> TableRow:
        """Return a row by name."""
        found = [row for row in self.rows if row.name == name]
        if not found:
            names = ", ".join(row.name for row in self.rows)
            raise SettingsError(f"Expected a row of table {self.name} from {names}, got '{name}'.")
        return found[0]


def known_tables() -> list[str]:
    """Return the names of the tables that come with the simulations."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_table(name: str, *, data_dir: str = "") -> TableDefinition:
    """Read a table's definition.

    Parameters
    ----------
    name : str
        Of a table that comes along, or the path of a ``.toml``.
    data_dir : str (default: "")
        Folder of the data sets.

    Raises
    ------
    SettingsError
        There is no such table, or something in it makes no sense.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise SettingsError(
            f"Expected a table from {', '.join(known_tables())}, or the path of a .toml, got "
            f"'{name}'."
        )
    try:
        read = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"Can't read the table {path}: {error}.") from error
    if unknown := sorted(set(read) - _OF_A_TABLE):
        raise SettingsError(
            f"Expected {', '.join(sorted(_OF_A_TABLE))} in the table {path}, got "
            f"{', '.join(unknown)}; options of all rows stand under [options]."
        )
    blocks = tuple(read.get("print", BLOCKS[:1]))
    if not set(blocks) <= set(BLOCKS):
        raise SettingsError(f"Expected print from {', '.join(BLOCKS)} in {path}, got {blocks}.")
    method = str(read.get("method", "eclm"))
    if method not in METHODS:
        raise SettingsError(f"Expected method from {', '.join(METHODS)} in {path}, got '{method}'.")
    rows = tuple(_row(row, read, path, data_dir) for row in read.get("row", ()))
    names = [row.name for row in rows]
    if not names or len(set(names)) < len(names):
        raise SettingsError(f"Expected rows of different names in {path}, got {names}.")
    results = RESULTS / path.stem if path.parent == FOLDER else path.with_suffix("")
    table = TableDefinition(
        name=path.stem,
        title=str(read.get("title", path.stem)),
        blocks=blocks,
        method=method,
        rows=rows,
        differences=tuple(_difference(given, path) for given in read.get("difference", ())),
        results=results,
    )
    for difference in table.differences:
        for row, strategy in (difference.of, difference.minus):
            if strategy not in table.row(row).settings().strategies:
                raise SettingsError(f"Expected a strategy of row {row} in {path}, got {strategy}.")
    return table


def _row(given: dict[str, Any], table: dict[str, Any], path: Path, data_dir: str) -> TableRow:
    name = str(given.get("name", ""))
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"Expected a name of small letters, digits, dots and dashes for each row of {path}, "
            f"got '{name}'."
        )
    what = f"the row {name} of {path}"
    layers = [table.get("options", {}), given]
    dataset = next((layer["dataset"] for layer in layers[::-1] if "dataset" in layer), "")
    layers.insert(1, table.get("options-of", {}).get(dataset, {}))
    written = {key: value for layer in layers for key, value in layer.items()}
    options: dict[str, Any] = read_preset(written["preset"]) if "preset" in written else {}
    options.pop("engine", None)
    own = {key: value for key, value in written.items() if key not in _OF_A_ROW}
    options |= sound_options(own, what, but=("rates", "data_dir", "offline_dir", "engine"))
    row = TableRow(
        name=name,
        title=str(given.get("title", name)),
        options={**options, **({"data_dir": data_dir} if data_dir else {})},
        tuned=str(written.get("tuned", "")),
        paper=str(written.get("paper", "")),
    )
    try:
        row.settings()
    except SettingsError as error:
        raise SettingsError(f"In {what}: {error}") from error
    return row


def _difference(given: dict[str, Any], path: Path) -> Difference:
    sides = [tuple(str(given.get(side, "")).split("/")) for side in ("of", "minus")]
    for side in sides:
        if len(side) != 2:
            raise SettingsError(
                f"Expected 'of' and 'minus' as row/strategy in each difference of {path}, got "
                f"'{'/'.join(side)}'."
            )
    (of, strategy), (minus, other) = sides
    return Difference(
        title=str(given.get("title", "")),
        of=(of, strategy),
        minus=(minus, other),
        paper=given.get("paper"),
    )
