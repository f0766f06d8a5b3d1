"""What a round costs the server on Flower's engine, against Flower's FedAvg on the same engine.

Sub-models of 1 MB out of a cloud model of 4 MB, against FedAvg, which sends the 4 MB to all; all
devices are asked in every round, and return what they got::

    python -m benchmarks.server_round

Every run is in a process of its own, which is the server (Ray's workers are others), the two
strategies in turn. *s*: seconds of a round after the first, its queries included. *MB*: most
resident memory of the server, above what it had before the engine started. Mark: both below
FedAvg's. Where the rows' *load* (processes that want a core, at the end of a run) is above what the
run itself needs, other work was going on, and its seconds say little.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.server_run import run
from benchmarks.versioned_rows import RESULTS, with_spread, write_rows

STRATEGIES = ("FedAvg", "ECLM")


def main(
    devices: Annotated[str, typer.Option(help="Devices a round.")] = "10,100,1000",
    rounds: Annotated[int, typer.Option(help="Rounds; the first is not counted.")] = 3,
    repetitions: Annotated[int, typer.Option(help="Runs of each strategy.")] = 3,
    window: Annotated[
        int | None, typer.Option(help="Most requests of ECLM under way; its default if not given.")
    ] = None,
    budget_every: Annotated[int, typer.Option(help="Of ECLM: rounds a budget is fresh.")] = 1,
    version: Annotated[str, typer.Option(help="Of the code, noted in the rows.")] = "after",
    out: Annotated[Path, typer.Option(help="A CSV file.")] = RESULTS / "server_round.csv",
) -> None:
    """Measure rounds of both strategies, in turn."""
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for number in map(int, devices.split(",")):
            for repetition in range(repetitions):
                for name in STRATEGIES[:: 1 if repetition % 2 == 0 else -1]:
                    rows += processes.submit(
                        run,
                        name,
                        number,
                        rounds=rounds,
                        repetition=repetition,
                        window=window,
                        budget_every=budget_every,
                    ).result()
                    frame = pd.DataFrame(rows)
                    frame.insert(0, "version", version)
                    write_rows(out, frame)  # after every run, because the whole takes long
    Console(width=140).print(table(frame))


def table(frame: pd.DataFrame) -> Table:
    """Lay out both strategies side by side, with the ratios within repetitions."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.title = f"{frame['version'].iloc[0]}: median (smallest-largest)"
    for heading in ("devices", "s: ECLM", "FedAvg", "ratio", "MB: ECLM", "FedAvg", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    frame = frame.assign(rise_mb=frame["peak_mb"] - frame["idle_mb"])
    for devices, part in frame.groupby("devices"):
        cells = []
        for column, form in (("seconds", ".2f"), ("rise_mb", ".0f")):
            wide = part.pivot(index=["repetition", "round"], columns="strategy", values=column)
            ratio = wide["ECLM"] / wide["FedAvg"]
            cells += [with_spread(wide[name], form) for name in ("ECLM", "FedAvg")]
            cells.append(with_spread(ratio))
        table.add_row(str(devices), *cells)
    table.caption = f"on top of {frame['idle_mb'].median():.0f} MB before the engine starts"
    return table


if __name__ == "__main__":
    typer.run(main)
