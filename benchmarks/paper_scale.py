"""The paper's table of accuracies (its section 6) at its sizes, in minutes, on one GPU.

::

    python -m benchmarks.paper_scale --data-dir DATA --out OUT --seconds 540
    python -m benchmarks.paper_scale --data-dir DATA --out OUT --smoke    # does everything run?

CIFAR-10 with ResNet18, 2 classes a device, and CIFAR-100 with VGG16, 10 classes a device; 500
devices, 25 a round; the paper's baselines as it ran them. A data set's strategies start from one
trained whole model and then run side by side, a process each. What is done is on disk at once, and
what is not done in time is dropped. Ten processes at once were too many for an H200: preparing
sub-models took most of 9 minutes. Where time is short, run a part, ``--cases`` and
``--strategies``, in a command of its own.

*Paper*: its accuracy (%). *Adapted*: ours after local adaptation, which is what the paper gives for
methods that adapt; *accuracy*: of the model as it was sent, the paper's for FedAvg and for the
static model.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from simulations.engine import run
from simulations.offline import DENSE
from simulations.presets import read_preset
from simulations.results import ROWS, Record
from simulations.settings import Settings, split_list
from simulations.summary import summarise

# Preset -> strategy -> accuracy (%) in the paper's Table 1.
PAPER = {
    "paper-cifar10": {
        "no-adaptation": 73.55,
        "local-adaptation": 84.19,
        "adaptivenet": 87.63,
        "fedavg": 73.68,
        "heterofl": 70.19,
        "eclm": 90.86,
    },
    "paper-cifar100": {
        "no-adaptation": 56.79,
        "local-adaptation": 67.10,
        "adaptivenet": 69.89,
        "fedavg": 60.81,
        "heterofl": 52.54,
        "eclm": 74.20,
    },
}
#: Strategies of one process, with colons between those of several processes. The first that gets
#: there trains the whole model, the others wait.
STRATEGIES = "no-adaptation,local-adaptation:eclm:fedavg:heterofl:adaptivenet"
SMOKE = {
    "devices": 40,
    "per_round": 5,
    "rounds": 2,
    "evaluate_every": 2,
    "evaluated": 5,
    "epochs": 1,
    "enhancing_epochs": 1,
}
LOGS = "logs"
_POLL = 0.5  # seconds


@dataclass(kw_only=True)
class Work:
    """Some strategies on a data set.

    Attributes
    ----------
    case : str
        The preset.
    settings : Settings
        Of these strategies; `settings.out_dir` is theirs alone.
    log : path
        What it prints.
    process : Process, optional
        What does it.
    began, ended : float
        Seconds since all began; nan: not yet.
    """

    case: str
    settings: Settings
    log: Path
    process: BaseProcess | None = field(default=None, repr=False)
    began: float = math.nan
    ended: float = math.nan

    @property
    def label(self) -> str:
        """Say which it is."""
        return f"{self.case}, {', '.join(self.settings.strategies)}"

    @property
    def running(self) -> bool:
        """Whether it is being done."""
        return self.process is not None and self.process.is_alive()


def main(
    data_dir: Annotated[Path, typer.Option(help="Folder with cifar10/ and cifar100/.")],
    out: Annotated[Path, typer.Option(help="Folder for rows and table.")],
    work: Annotated[Path, typer.Option(help="Folder for runs and logs.")] = Path(
        "runs/paper-scale"
    ),
    seconds: Annotated[float, typer.Option(help="Wall time after which all ends.")] = 540,
    compute: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    cases: Annotated[str, typer.Option(help="Presets, comma separated.")] = ",".join(PAPER),
    rounds: Annotated[int, typer.Option(help="Rounds; the paper tells no number.")] = 30,
    evaluated: Annotated[int, typer.Option(help="Devices evaluated, of 500.")] = 150,
    epochs: Annotated[int, typer.Option(help="Of the whole model; 0: the preset's.")] = 0,
    enhancing_epochs: Annotated[int, typer.Option(help="Of sub-models; 0: the preset's.")] = 0,
    strategies: Annotated[
        str, typer.Option(help="Comma separated in one process, colons between processes.")
    ] = STRATEGIES,
    smoke: Annotated[bool, typer.Option("--smoke", help="Everything, in tiny.")] = False,
) -> None:
    """Run all strategies on all cases within a time, and print a table beside the paper's."""
    sizes: dict[str, Any] = {"rounds": rounds, "evaluate_every": rounds, "evaluated": evaluated}
    given = {"epochs": epochs, "enhancing_epochs": enhancing_epochs}
    sizes |= {name: number for name, number in given.items() if number}
    options = {"data_dir": str(data_dir), "compute": compute, **(SMOKE if smoke else sizes)}
    works = []
    for case in cases.split(","):
        works += works_of(case, read_preset(case), options, work, strategies)
    shutil.rmtree(work, ignore_errors=True)
    finished = run_all(works, out, seconds=seconds)
    for each in works:
        print(f"{each.label}: from second {each.began:.0f} to {each.ended:.0f}")
    Console(width=None if sys.stdout.isatty() else 110).print(table_of(finished))
    if len(finished) < sum(len(work.settings.strategies) for work in works):
        print(f"Not all was done: see {work / LOGS}.")


def works_of(
    case: str,
    preset: Mapping[str, Any],
    options: Mapping[str, Any],
    folder: Path,
    strategies: str = STRATEGIES,
) -> list[Work]:
    """Divide a case into works, one a process, that share what the cloud prepares."""
    works = []
    shared = {"offline_dir": str(folder / case / "offline")}
    for names in (split_list(part) for part in strategies.split(":")):
        own = {"strategies": names, "out": str(folder / case / names[0])}
        settings = Settings.suited(**{**preset, **options, **shared, **own})
        log = folder / LOGS / f"{case}-{names[0]}.log"
        works.append(Work(case=case, settings=settings, log=log))
    return works


def run_all(works: Sequence[Work], out: Path, *, seconds: float) -> pd.DataFrame:
    """Run works side by side until all are done, or time is up.

    Returns
    -------
    DataFrame
        What `collected` writes.
    """
    start = time.monotonic()
    spawn = multiprocessing.get_context("spawn")  # a forked process can't use CUDA
    done: list[float] = []
    try:
        for work in works:
            work.process = spawn.Process(target=do, args=(work.settings, work.log), daemon=True)
            work.process.start()
            work.began = time.monotonic() - start
        while any(work.running for work in works) and time.monotonic() - start < seconds:
            for work in works:
                if not work.running and math.isnan(work.ended):
                    work.ended = time.monotonic() - start
            rows = [work.settings.out_dir / ROWS for work in works]
            before, done = done, [file.stat().st_mtime for file in rows if file.exists()]
            if done != before:
                collected(works, out)
            time.sleep(_POLL)
    finally:
        for work in works:
            if work.process is not None:
                work.process.kill()
                work.process.join()
    return collected(works, out)


def do(settings: Settings, log: Path) -> None:
    """Run a work in a process of its own; what it prints goes to a file, line by line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)  # many of these run side by side
    try:
        run(settings, "in-process")
    except BaseException:
        traceback.print_exc()
        raise


def collected(works: Sequence[Work], out: Path) -> pd.DataFrame:
    """Write what is done so far: ``table.csv``, and the evaluated rows at the end in ``rows.csv``.

    Returns
    -------
    DataFrame
        A row for each strategy that is done.
    """
    rows, lines = [], []
    for work in works:
        if not (work.settings.out_dir / ROWS).exists():
            continue
        record = Record.begin(replace(work.settings, resume=True), "in-process")
        frame = record.frame
        last = frame["round"] == frame["round"].max()
        rows.append(frame[last & frame["accuracy_before"].notna()].assign(case=work.case))
        for strategy, own in summarise(frame, wall_seconds=record.wall_seconds).items():
            settings = work.settings
            lines.append(
                {
                    "case": work.case,
                    "strategy": strategy,
                    "paper": PAPER.get(work.case, {}).get(strategy),
                    "dense": record.cloud_model[str(settings.seeds[0])].get(DENSE),
                    "devices": settings.devices,
                    "evaluated": settings.evaluated or settings.devices,
                    "rounds": settings.rounds,
                    **{name: own[name] for name in own if not isinstance(own[name], dict)},
                }
            )
    table = pd.DataFrame(lines)
    if lines:
        out.mkdir(parents=True, exist_ok=True)
        pd.concat(rows).to_csv(out / "rows.csv", index=False)
        table.to_csv(out / "table.csv", index=False)
    return table


def table_of(frame: pd.DataFrame) -> Table:
    """Lay out what is done beside the paper's accuracies."""
    table = Table(title="At the end: mean over the evaluated devices, 95 % interval")
    for heading in ("case", "strategy", "paper", "accuracy", "adapted", "masked", "MB", "wall s"):
        table.add_column(heading, justify="left" if heading in ("case", "strategy") else "right")
    for row in frame.to_dict("records"):
        table.add_row(
            row["case"],
            row["strategy"],
            f"{row['paper']:.2f}",
            f"{row['accuracy_before']:.2%} ± {100 * row['ci95']:.1f}",
            f"{row['accuracy_after']:.2%} ± {100 * row['ci95_after']:.1f}",
            f"{row['masked_after']:.2%}",
            f"{(row['bytes_down'] + row['bytes_up']) / 1e6:,.0f}",
            f"{row['wall_seconds']:.0f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
