"""The small rows that a table is made from, and that are committed.

For each row of a table three files: what every device came to (``<row>.csv``), how the mean went on
with rounds, bytes and simulated time (``<row>-course.csv``), and which settings made it
(``<row>.json``). A result is one (strategy, seed); what is there is kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from simulations.results import EXTENDABLE, replace_file
from simulations.settings import Settings, SettingsError, option
from simulations.summary import curves

#: What may differ between the run of one seed and the row, and places, which are no settings.
_FREE = (*EXTENDABLE, "rates", "compute")
_ENDS = {  # column of a run -> here; means over the ends of steps
    "accuracy_before": "sent",
    "accuracy_after": "adapted",
    "masked_after": "masked",
    "memory": "memory",
    "seconds": "seconds",
}
_SHIFTS = {"accuracy_held": "held", "accuracy_fallback": "fallback"}  # the same; over shifts
_KEYS = ["strategy", "seed", "device"]
_DIGITS = 4


def ends(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each strategy, seed and evaluated device.

    Parameters
    ----------
    frame : DataFrame
        From `results.to_frame`.

    Returns
    -------
    DataFrame
        Means over the ends of steps: accuracy ``sent``, ``adapted`` and, adapted, ``masked``; peak
        ``memory`` (bytes) and ``seconds`` of an adaptation. Means over shifts, right after them:
        accuracy of the model ``held``, and with ``fallback`` on the one sent.
    """
    frame = frame[frame["accuracy_before"].notna()]  # the others have bytes alone
    last = frame.groupby(["strategy", "seed", "step"])["round"].transform("max")
    result = frame[frame["round"] == last].groupby(_KEYS)[list(_ENDS)].mean().rename(columns=_ENDS)
    result["memory"] = result["memory"].round()
    for column, name in _SHIFTS.items():
        result[name] = frame.groupby(_KEYS)[column].mean()
    return _short(result.reset_index())


def course(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each strategy, seed and evaluated round; of later steps only their ends.

    Returns
    -------
    DataFrame
        Means over devices: accuracy ``sent`` and ``adapted``; so far: ``bytes`` of queries and
        training, both ways, and simulated seconds of rounds (``clock``).
    """
    result = curves(frame).rename(columns={"accuracy_before": "sent", "accuracy_after": "adapted"})
    ends_at = result.groupby(["strategy", "seed", "step"])["round"].transform("max")
    result = result[(result["step"] == 0) | (result["round"] == ends_at)]
    columns = ["strategy", "seed", "step", "round", "sent", "adapted", "bytes", "clock"]
    return _short(result[columns].reset_index(drop=True))


def _short(frame: pd.DataFrame) -> pd.DataFrame:
    """Round to what a table can show, and more: accuracies to 0.01 points."""
    for name in frame.select_dtypes("float"):
        values = frame[name]
        if name in ("seconds", "clock"):
            frame[name] = values.map(lambda value: float(f"{value:.{_DIGITS}g}"))
        elif name == "memory":
            frame[name] = values.astype("int64")
        else:
            frame[name] = values.round(_DIGITS)
    return frame


@dataclass(kw_only=True)
class Rows:
    """The results of one row of a table.

    Attributes
    ----------
    ends, course : DataFrame
        See the functions.
    settings : dict[str, Any]
        What made them, apart from what may differ.
    rates : dict[str, float]
        Strategy -> learning rate.
    wall_seconds : dict[str, float]
        Seed -> of its processes so far, offline stage included.
    """

    ends: pd.DataFrame = field(default_factory=pd.DataFrame)
    course: pd.DataFrame = field(default_factory=pd.DataFrame)
    settings: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    wall_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> set[tuple[str, int]]:
        """The (strategy, seed) pairs that are there."""
        if self.ends.empty:
            return set()
        pairs = self.ends[["strategy", "seed"]].drop_duplicates()
        return set(zip(pairs["strategy"].tolist(), pairs["seed"].tolist(), strict=True))

    def forget(self, strategies: Collection[str]) -> None:
        """Drop the results of some strategies."""
        for name in ("ends", "course"):
            frame = getattr(self, name)
            if len(frame):
                setattr(self, name, frame[~frame["strategy"].isin(strategies)])
        self.rates = {name: r for name, r in self.rates.items() if name not in strategies}

    def check(self, settings: Settings, path: Path) -> None:
        """Refuse results of other settings.

        Raises
        ------
        SettingsError
            With what differs.
        """
        if not self.done:
            return
        now = identity(settings)
        for name in sorted(now.keys() | self.settings.keys()):
            if self.settings.get(name) != now.get(name):
                raise _made_with(path, option(name), self.settings.get(name), now.get(name))
        for strategy, rate in self.rates.items():
            own = settings.with_rate_of(strategy).learning_rate
            if strategy in settings.strategies and own != rate:
                raise _made_with(path, f"the learning rate of {strategy}", rate, own)

    def add(self, frame: pd.DataFrame, settings: Settings) -> None:
        """Add results of a run that are not there yet."""
        pairs = pd.MultiIndex.from_frame(frame[["strategy", "seed"]])
        new = frame[~pairs.isin(list(self.done))]
        if new.empty:
            return
        self.settings = identity(settings)
        for strategy in new["strategy"].unique():
            self.rates[str(strategy)] = settings.with_rate_of(str(strategy)).learning_rate
        self.ends = _joined([self.ends, ends(new)], ["seed", "strategy", "device"])
        self.course = _joined([self.course, course(new)], ["seed", "strategy", "round"])


def read_rows(folder: Path, row: str) -> Rows:
    """Read what a folder has of a row; nothing, if it has nothing."""
    if not _paths(folder, row)[2].exists():
        return Rows()
    ends_path, course_path, notes_path = _paths(folder, row)
    notes = json.loads(notes_path.read_text())
    # What rows of an earlier version don't have is not a number.
    columns = [*_KEYS, *_ENDS.values(), *_SHIFTS.values()]
    ends = pd.read_csv(ends_path).reindex(columns=columns)
    return Rows(ends=ends, course=pd.read_csv(course_path), **notes)


def write_rows(rows: Rows, folder: Path, row: str) -> None:
    """Write them, each file whole or not at all; the notes last, which tell that the others are."""
    folder.mkdir(parents=True, exist_ok=True)
    ends_path, course_path, notes_path = _paths(folder, row)
    replace_file(ends_path, rows.ends.to_csv(index=False))
    replace_file(course_path, rows.course.to_csv(index=False))
    notes = {
        "settings": rows.settings,
        "rates": dict(sorted(rows.rates.items())),
        "wall_seconds": rows.wall_seconds,
    }
    replace_file(notes_path, json.dumps(notes, indent=1) + "\n")


def identity(settings: Settings) -> dict[str, Any]:
    """Return what makes the results of two settings comparable, as JSON gives it back."""
    values = json.loads(json.dumps(asdict(settings)))
    kept = {name: value for name, value in values.items() if name not in _FREE}
    defaults = json.loads(json.dumps(asdict(Settings())))
    # What a later version adds with a default that changes nothing, changes nothing.
    return {name: value for name, value in kept.items() if value != defaults[name]}


def _paths(folder: Path, row: str) -> tuple[Path, Path, Path]:
    return folder / f"{row}.csv", folder / f"{row}-course.csv", folder / f"{row}.json"


def _joined(frames: list[pd.DataFrame], order: list[str]) -> pd.DataFrame:
    frame = pd.concat([part for part in frames if len(part)], ignore_index=True)
    return frame.sort_values(order, kind="stable", ignore_index=True)


def _made_with(path: Path, what: str, was: object, now: object) -> SettingsError:
    return SettingsError(
        f"Expected the settings that made {path}, where {what} was {was}, got {now}; take the "
        "change back, or remove the row's files to run it anew."
    )
