"""``python -m simulations table``: what is missing is run, then the table is printed."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console

from simulations.settings import split_list
from simulations.tables.definition import read_table
from simulations.tables.rates import tune_rows
from simulations.tables.report import write_report
from simulations.tables.running import TableRun


def run_table(
    name: str,
    *,
    data_dir: str,
    jobs: int,
    runs: Path,
    tune: bool,
    report: bool,
    redo: str,
    page: str,
    only: str = "",
    compute: str = "cpu",
) -> None:
    """Run what a table misses and report it; see the options of the command."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    table = read_table(name, data_dir=data_dir)
    console = Console(width=None if sys.stdout.isatty() else 160)
    failures: list[str] = []
    if not report:
        if tune:
            tune_rows(table, runs, console, redo=split_list(redo), only=split_list(only))
            return
        choice = {"redo": split_list(redo), "only": split_list(only)}
        failures = TableRun(table, runs, console, compute=compute, **choice).run(jobs)
    write_report(table, console, page=Path(page) if page else None)
    if failures:
        sys.exit(f"{len(failures)} parts failed; the same command goes on with them.")
