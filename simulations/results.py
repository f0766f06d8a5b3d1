"""What a run leaves: rows, and the notes that let it be resumed. All else is made from them.

Bytes of a row are those of the queries and training messages the device exchanged since its last
row. Evaluation messages are not counted: they are the experimenter's, not the method's. The queries
that precede them are, so that the price of knowing every device stands in the results. What it
costs to hand a device its model stands apart, in the rows at the end of each step.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from simulations.settings import Settings, SettingsError, option

ROWS, NOTES, PICTURE, SUMMARY = "results.csv", "run.json", "accuracy.png", "summary.json"
_FOLDERS = ("offline", "devices")
#: May differ when a run is resumed: what is there stays, what is missing is done.
EXTENDABLE = ("strategies", "seeds", "data_dir", "out", "offline_dir", "resume")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated device; or one that is not, and spent bytes.

    Attributes
    ----------
    strategy, seed, step, round, device
        Which. Rounds count on through all steps.
    accuracy_before, accuracy_after : float
        0 to 1, on the device's own test data of that step, before and after local adaptation.
    masked_before, masked_after : float
        The same with logits restricted to the device's classes.
    accuracy_held : float
        At a step's first evaluation: of the model the device adapted last, on its new data; nan
        where data didn't shift.
    accuracy_fallback : float
        The same of that model or the one it was sent, whichever serves the training data that came
        better, now that both were told the new classes.
    accuracy_global : float
        Of the whole cloud model on the cloud's test data; nan where there is no such model.
    bytes_down, bytes_up : int
        Of queries and training since the device's last row.
    bytes_delivered : int
        Of the model it was handed; 0 where it was only evaluated.
    modules : int
        Held.
    memory : float
        Peak bytes of training its sub-model, by the cost model.
    seconds : float
        Simulated, of its local adaptation.
    clock : float
        Simulated seconds that rounds took so far.

    Of a device that is not evaluated (`Settings.evaluated`), all that an evaluation tells is nan.
    """

    strategy: str
    seed: int
    step: int
    round: int
    device: int
    accuracy_before: float = math.nan
    accuracy_after: float = math.nan
    masked_before: float = math.nan
    masked_after: float = math.nan
    accuracy_held: float = math.nan
    accuracy_fallback: float = math.nan
    accuracy_global: float = math.nan
    bytes_down: int
    bytes_up: int
    bytes_delivered: int = 0
    modules: int = 0
    memory: float = math.nan
    seconds: float = math.nan
    clock: float

    @property
    def evaluated(self) -> bool:
        """Whether the device was evaluated; it then has test samples, and so an accuracy."""
        return not math.isnan(self.accuracy_before)


def to_frame(rows: list[Row]) -> pd.DataFrame:
    """Put rows into a table, one column a field."""
    return pd.DataFrame([asdict(row) for row in rows], columns=list(Row.__annotations__))


def read(path: Path) -> list[Row]:
    """Read rows as they were written, to the last digit."""
    kinds: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "float": lambda text: float(text or "nan"),
    }
    with open(path, newline="") as file:
        return [
            Row(**{f.name: kinds[str(f.type)](row[f.name]) for f in fields(Row) if f.name in row})
            for row in csv.DictReader(file)
        ]


@dataclass(kw_only=True)
class Record:
    """A run so far, in a folder.

    Attributes
    ----------
    settings : Settings
    engine : str
    frame : DataFrame
        The rows of the pairs that are done.
    done : list of (strategy, seed)
    wall_seconds : dict[str, float]
        Strategy -> wall seconds over all seeds.
    cloud_model : dict[str, dict[str, float]]
        Seed -> accuracy of the whole cloud model, dense and after each offline preparation.
    """

    settings: Settings
    engine: str
    frame: pd.DataFrame = field(default_factory=lambda: to_frame([]))
    done: list[tuple[str, int]] = field(default_factory=list)
    wall_seconds: dict[str, float] = field(default_factory=dict)
    cloud_model: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def begin(cls, settings: Settings, engine: str) -> Record:
        """Start a record in the settings' folder: empty, or where an interrupted run stopped.

        Raises
        ------
        SettingsError
            The folder can't be written, or holds the run of other settings, or what may be the
            user's own.
        """
        out = settings.out_dir
        make_out_dir(settings)
        if settings.resume and (out / NOTES).exists():
            return cls._resumed(settings, engine)
        _clear(settings)
        record = cls(settings=settings, engine=engine)
        record.save()
        return record

    @classmethod
    def _resumed(cls, settings: Settings, engine: str) -> Record:
        out = settings.out_dir
        notes = json.loads((out / NOTES).read_text())
        now = json.loads(json.dumps(asdict(settings)))
        for name, value in notes["settings"].items():
            if name not in EXTENDABLE and now.get(name) != value:
                raise SettingsError(
                    f"Expected the settings of the run in {out} with --resume, where "
                    f"{option(name)} was {value}, got {now.get(name)}; use the same, or another "
                    "--out."
                )
        record = cls(
            settings=settings,
            engine=engine,
            done=[(strategy, seed) for strategy, seed in notes["done"]],
            wall_seconds=notes["wall_seconds"],
            cloud_model=notes["cloud_model"],
        )
        if record.done:
            rows = [row for row in read(out / ROWS) if (row.strategy, row.seed) in record.done]
            record.frame = to_frame(rows)
        return record

    def add(self, strategy: str, seed: int, rows: list[Row], wall_seconds: float) -> None:
        """Add what a strategy did for a seed, and save."""
        self.frame = pd.concat([self.frame, to_frame(rows)]) if len(self.frame) else to_frame(rows)
        self.done.append((strategy, seed))
        self.wall_seconds[strategy] = self.wall_seconds.get(strategy, 0.0) + wall_seconds
        self.save()

    def save(self) -> None:
        """Write rows, then notes, each whole or not at all."""
        out = self.settings.out_dir
        if self.done:
            self.frame = self._in_order()
            replace_file(out / ROWS, self.frame.to_csv(index=False))
        notes: dict[str, Any] = {
            "settings": asdict(self.settings),
            "engine": self.engine,
            "done": self.done,
            "wall_seconds": self.wall_seconds,
            "cloud_model": self.cloud_model,
        }
        replace_file(out / NOTES, json.dumps(notes, indent=2) + "\n")

    def _in_order(self) -> pd.DataFrame:
        """Order rows as an uninterrupted run writes them: by seed, then by strategy."""
        seeds = list(dict.fromkeys([*self.settings.seeds, *self.frame["seed"]]))
        names = list(dict.fromkeys([*self.settings.strategies, *self.frame["strategy"]]))
        places = {(s, n): i for i, (s, n) in enumerate((s, n) for s in seeds for n in names)}
        pairs = zip(self.frame["seed"], self.frame["strategy"], strict=True)
        order = pd.Series([places[pair] for pair in pairs]).argsort(kind="stable")
        return self.frame.iloc[order].reset_index(drop=True)


def make_out_dir(settings: Settings) -> None:
    """Make the folder for the results, before anything is computed that could not be kept.

    Raises
    ------
    SettingsError
        It can't be made.
    """
    try:
        settings.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"Can't write to --out {settings.out}: {error.strerror}.") from error


def _clear(settings: Settings) -> None:
    """Remove what an earlier run left: nothing old may look like this run's.

    Raises
    ------
    SettingsError
        There are folders of a run's names, and no run that they could be of.
    """
    out = settings.out_dir
    folders = [folder for name in _FOLDERS if (folder := out / name).exists()]
    if settings.offline_dir:  # the prepared models to use may be those of the earlier run
        used = Path(settings.offline_dir).resolve()
        folders = [folder for folder in folders if not used.is_relative_to(folder.resolve())]
    if folders and not (out / NOTES).exists():
        raise SettingsError(
            f"Expected --out as a new folder or that of a run, got {out} with a folder "
            f"{folders[0].name} and no {NOTES}; use another --out, or move {folders[0].name} away."
        )
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for name in (ROWS, PICTURE, SUMMARY, NOTES):  # notes last: they tell whose the others are
        (out / name).unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)
