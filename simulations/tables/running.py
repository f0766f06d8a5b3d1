"""Running what a table misses: one process a row and seed, several at a time, each on one thread.

A part of a table (one row, one seed) is an ordinary run with a folder of its own, in which it goes
on when it was interrupted; the command stands in its ``command.txt``. Whatever a part finished is
put among the table's rows at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from simulations.held import devices_folder
from simulations.results import NOTES, ROWS, read, to_frame
from simulations.settings import Settings, SettingsError, option
from simulations.tables.definition import TableDefinition, TableRow
from simulations.tables.rates import rates_of
from simulations.tables.rows import Rows, identity, read_rows, write_rows

OPTIONS, RATES, LOG, COMMAND = "options.toml", "rates.toml", "log.txt", "command.txt"
_GIVEN = ("strategies", "seeds", "out", "offline_dir", "resume", "rates")  # on the command line
_LAST_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Part:
    """One row and seed of a table.

    Attributes
    ----------
    row : TableRow
    settings : Settings
        Of this seed.
    folder : Path
        Where it runs: another one for other settings.
    """

    row: TableRow
    settings: Settings
    folder: Path

    @property
    def seed(self) -> int:
        """The seed."""
        return self.settings.seeds[0]


class TableRun:
    """What is there of a table, and what is missing.

    Parameters
    ----------
    table : TableDefinition
    runs : Path
        Folder for the runs, and for the cloud models that all tables share.
    console : Console
    compute : str (default: "cpu")
        Where models compute: "cpu" or "cuda".
    redo : collection of str
        Strategies whose results are dropped, to be run anew: their method or rate has changed.
    only : collection of str
        Names of the rows to run, or to run anew; empty: all.
    """

    def __init__(
        self,
        table: TableDefinition,
        runs: Path,
        console: Console,
        *,
        compute: str = "cpu",
        redo: Collection[str] = (),
        only: Collection[str] = (),
    ) -> None:
        self._table, self._runs, self._console = table, runs.absolute(), console
        self._compute = compute
        self._to_run = [table.row(name) for name in only] or list(table.rows)
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self.rows: dict[str, Rows] = {}
        for row in table.rows:
            self.rows[row.name] = rows = read_rows(table.results, row.name)
            if not rows.settings or row not in self._to_run:
                continue  # without results it may lack its learning rates
            rows.forget(redo)
            rows.check(self.settings(row), table.results / row.name)
            if redo:
                write_rows(rows, table.results, row.name)
                for part in self.parts(row):
                    shutil.rmtree(devices_folder(part.folder), ignore_errors=True)
                    for file in (ROWS, NOTES):
                        (part.folder / file).unlink(missing_ok=True)

    def settings(self, row: TableRow) -> Settings:
        """Return a row's settings, with tuned learning rates."""
        return row.settings(rates=rates_of(self._table, row))

    def parts(self, row: TableRow) -> list[Part]:
        """Return the parts of a row, one a seed."""
        settings = self.settings(row)
        made = json.dumps([identity(settings), settings.rates], sort_keys=True)
        digest = hashlib.blake2b(made.encode()).hexdigest()[:8]
        folder = self._runs / self._table.name / row.name
        return [
            Part(
                row=row,
                settings=row.settings(rates=settings.rates, seeds=(seed,)),
                folder=folder / f"seed-{seed}-{digest}",
            )
            for seed in settings.seeds
        ]

    def missing(self, part: Part) -> list[str]:
        """Return the strategies of a part that have no results."""
        done = self.rows[part.row.name].done
        return [name for name in part.settings.strategies if (name, part.seed) not in done]

    def run(self, jobs: int) -> list[str]:
        """Run what is missing, a number of parts at a time; returns what failed, in words."""
        parts = [part for row in self._to_run for part in self.parts(row)]
        for part in parts:
            self._gather(part)
        parts = [part for part in parts if self.missing(part)]
        self._console.print(f"{len(parts)} parts of table {self._table.name} to run.")
        failures = []
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for future in as_completed([pool.submit(self._run, part) for part in parts]):
                    if failure := future.result():
                        failures.append(failure)
                        self._console.print(failure, markup=False)
            except KeyboardInterrupt:
                self._stop()
                raise
        return failures

    def _run(self, part: Part) -> str:
        """Run a part; returns why it failed, or nothing."""
        name = f"{part.row.name}, seed {part.seed}"
        start = time.perf_counter()
        with self._lock:  # or one that starts while all are stopped would go on
            if self._stopped:
                return ""
            process = self._started(part)
            self._processes.add(process)
        code = process.wait()
        self._gather(part, wall_seconds=time.perf_counter() - start)
        if self._stopped:
            return ""
        if missing := self.missing(part):
            lines = (part.folder / LOG).read_text(errors="replace").splitlines()[-_LAST_LINES:]
            return "\n".join([f"{name}: no results of {', '.join(missing)} ({code}).", *lines])
        self._console.print(f"{name}: {time.perf_counter() - start:.0f} s.")
        return ""

    def _started(self, part: Part) -> subprocess.Popen[bytes]:
        """Start a part's process."""
        part.folder.mkdir(parents=True, exist_ok=True)
        write_options(part.settings, part.folder)
        command = self._command(part)
        (part.folder / COMMAND).write_text(f"{shlex.join(command)}\n")
        with open(part.folder / LOG, "wb") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )

    def _command(self, part: Part) -> list[str]:
        return [
            *(sys.executable, "-m", "simulations", "run"),
            *("--preset", str(part.folder / OPTIONS)),
            *("--strategies", ",".join(self.missing(part))),
            *("--seeds", str(part.seed), "--engine", "in-process", "--resume"),
            *("--offline-dir", str(self._runs / "offline"), "--out", str(part.folder)),
            *("--compute", self._compute),
        ]

    def _gather(self, part: Part, *, wall_seconds: float = 0.0) -> None:
        """Put what a part finished among the rows."""
        notes, results = part.folder / NOTES, part.folder / ROWS
        if not (notes.exists() and results.exists()):
            return
        told = json.loads(notes.read_text())
        made, meant = (
            identity(settings)
            for settings in (Settings.from_json(json.dumps(told["settings"])), part.settings)
        )
        if made != meant:
            other = [name for name in {**made, **meant} if made.get(name) != meant.get(name)]
            raise SettingsError(
                f"Expected the run in {part.folder} to have the settings of row {part.row.name}, "
                f"got another {', '.join(map(option, other))}; remove the folder."
            )
        finished = {(name, seed) for name, seed in told["done"]}
        frame = to_frame([row for row in read(results) if (row.strategy, row.seed) in finished])
        with self._lock:
            rows = self.rows[part.row.name]
            before = rows.done
            rows.add(frame[frame["strategy"].isin(part.settings.strategies)], part.settings)
            if wall_seconds:
                key = str(part.seed)
                rows.wall_seconds[key] = round(rows.wall_seconds.get(key, 0) + wall_seconds, 1)
            if rows.done != before or wall_seconds:
                write_rows(rows, self._table.results, part.row.name)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                if process.poll() is None:
                    process.terminate()


def write_options(settings: Settings, folder: Path) -> None:
    """Write settings as a preset, with the learning rates by strategy in a file beside it.

    All of them, because what a preset leaves out becomes what suits the data set.
    """
    lines = []
    for name, value in asdict(settings).items():
        if name in _GIVEN:
            continue
        given = ",".join(map(str, value)) if isinstance(value, tuple) else value
        lines.append(f"{name.replace('_', '-')} = {json.dumps(given)}")
    if settings.rates:
        rates = [f"{strategy} = {rate!r}" for strategy, rate in settings.rates]
        (folder / RATES).write_text("\n".join(rates) + "\n")
        lines.append(f"rates = {json.dumps(str(folder / RATES))}")
    (folder / OPTIONS).write_text("\n".join(lines) + "\n")
