"""Where the time of a whole round goes: 100 devices, the slim CIFAR ResNet, little data.

All devices are asked, get sub-models of a quarter of the modules, train one epoch on 32 images, and
are evaluated, in this process and on Flower's engine (Ray, two workers)::

    python -m benchmarks.round_profile

A part's time is without the parts within it. On Ray, work on devices is done by the workers side by
side, so its seconds are divided by their number, to add up to the round's. What is then left of
the round is Flower's and Ray's: *Ray* is the time from handing a message to the pool of workers to
the reply, without the device's work timed in it, divided likewise; *Flower* is all else: queues,
sweeps over the nodes, waiting for replies, and what the server does outside the functions named.
Work of the server goes on beside the workers', so *Flower* can come out below zero. In one process
this *rest* is the copies and contexts of the in-process engine. The first round is left out: in it
devices decode their data and Ray starts.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from rich.console import Console
from rich.table import Table

from benchmarks.profile_app import FOLDER, WATCH, app, model_of_process, seconds_of_workers
from benchmarks.versioned_rows import RESULTS, with_spread, write_rows
from eclm_flower import ECLM
from eclm_flower.federation import InProcessGrid

ENGINES = ("in process", "Ray")
PARTS = ("query", "derive", "pack", "Flower", "Ray", "train", "unpack", "merge", "evaluate", "rest")
USERS = ("train", "evaluate")  # parts that are not the plugin's, beside the engines'
WORKERS = 2

# Functions of the server, by part; those that a version of the code lacks are left out.
_FEDERATION, _ADAPTATION = "eclm_flower.federation", "eclm_flower.adaptation"
SERVER = (
    ("query", f"{_FEDERATION}.roster", "Roster.greet"),
    ("query", f"{_FEDERATION}.profiles", "Profiles.update"),
    ("derive", f"{_FEDERATION}.strategy", "ECLM.derive"),
    ("derive", f"{_FEDERATION}.strategy", "ECLM.derive_all"),
    ("pack", f"{_FEDERATION}.cloud", "CloudModel.pack"),
    ("pack", f"{_FEDERATION}.exchange", "content_bytes"),
    ("unpack", f"{_FEDERATION}.strategy", "read_training"),
    ("unpack", f"{_FEDERATION}.replies", "_read_update"),
    ("unpack", f"{_FEDERATION}.replies", "outliers"),
    ("unpack", f"{_FEDERATION}.replies", "Training.__iter__"),
    ("unpack", f"{_FEDERATION}.replies", "Training._read"),
    ("unpack", f"{_FEDERATION}.replies", "update_norm"),
    ("unpack", f"{_ADAPTATION}.outliers", "ChangeNorm.of"),
    ("merge", f"{_FEDERATION}.strategy", "ECLM.merge"),
    ("merge", f"{_FEDERATION}.cloud", "CloudModel.after"),
    # Waiting for devices, and the engine itself.
    ("rest", f"{_FEDERATION}.rounds", "exchange"),
    ("rest", f"{_FEDERATION}.rounds", "stream"),
    ("rest", f"{_FEDERATION}.profiles", "exchange"),
)


def watch_server() -> None:
    """Time the server's functions in this process from now on."""
    for part, module, path in SERVER:
        owner: Any = importlib.import_module(module)
        *owners, name = path.split(".")
        for step in owners:
            owner = getattr(owner, step, None)
        if hasattr(owner, name):
            WATCH.watch(owner, name, f"{part}: {path}")


def profile_rounds(engine: str, devices: int, rounds: int) -> list[dict[str, Any]]:
    """Run a federation; return the seconds of each function in each round but the first."""
    torch.set_num_threads(1)
    watch_server()
    model = model_of_process()
    snapshots: list[tuple[float, Counter[str]]] = []
    server_app = ServerApp()
    in_pool: list[float] = []

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as files:
        times = Path(files) / "times"
        times.mkdir()

        def end_of_round(server_round: int, arrays: ArrayRecord) -> None:
            now = Counter(WATCH.seconds)
            if engine == "Ray":
                on_devices = seconds_of_workers(times)
                now["Ray: "] = sum(in_pool) - sum(on_devices.values())
                now.update(on_devices)
                # The workers' seconds, side by side.
                for name in ["Ray: ", *on_devices]:
                    now[name] /= WORKERS
            snapshots.append((time.perf_counter(), now))

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            strategy = ECLM(
                model, fraction_train=1.0, fraction_evaluate=1.0, min_available_nodes=devices
            )
            strategy.start(
                grid,
                ArrayRecord(model.state_dict()),
                num_rounds=rounds,
                evaluate_fn=end_of_round,
            )

        if engine == "Ray":
            os.environ[FOLDER] = str(times)
            _watch_pool(in_pool)
            run_simulation(
                server_app,
                app,
                num_supernodes=devices,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                    "init_args": {
                        "_temp_dir": files,
                        "num_cpus": WORKERS,
                        "include_dashboard": False,
                        "logging_level": "error",
                        "log_to_driver": False,
                    },
                },
            )
        else:
            context = Context(1, 0, {}, state=RecordDict(), run_config={})
            server_app(InProcessGrid(app, devices), context)
    if len(snapshots) != rounds + 1:
        raise RuntimeError(f"Expected {rounds} rounds, got {len(snapshots) - 1}.")
    rows = []
    for number in range(2, rounds + 1):
        (before, earlier), (after, later) = snapshots[number - 1], snapshots[number]
        spent = Counter({name: later[name] - earlier[name] for name in later})
        rows += _rows(engine, number, after - before, spent)
    return rows


def _watch_pool(seconds: list[float]) -> None:
    """Note how long each message is with Ray; its threads append, which is atomic."""
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

    process: Callable[..., Any] = RayBackend.process_message

    def timed(self: RayBackend, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return process(self, *args)
        finally:
            seconds.append(time.perf_counter() - start)

    RayBackend.process_message = timed  # type: ignore[method-assign]


def _rows(engine: str, number: int, whole: float, spent: Counter[str]) -> list[dict[str, Any]]:
    """Make rows of a round, the remainder included."""
    waits = [name for name in spent if name.startswith("rest: ")]
    for name in waits:  # what is within waiting, or outside all functions, is the remainder
        del spent[name]
    left = whole - sum(spent.values())
    spent["Flower: " if engine == "Ray" else "rest: "] = left
    return [
        {
            "engine": engine,
            "round": number,
            "part": name.partition(": ")[0],
            "function": name.partition(": ")[2],
            "seconds": seconds,
            "round_seconds": whole,
        }
        for name, seconds in spent.items()
    ]


def main(
    devices: Annotated[int, typer.Option(help="Devices, all asked in every round.")] = 100,
    rounds: Annotated[int, typer.Option(help="Rounds; the first is not counted.")] = 4,
    engine: Annotated[str, typer.Option(help="in process, Ray, or both.")] = "both",
    version: Annotated[str, typer.Option(help="Of the code, noted in the rows.")] = "after",
    out: Annotated[Path, typer.Option(help="A CSV file.")] = RESULTS / "round_profile.csv",
) -> None:
    """Profile whole rounds."""
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for name in ENGINES if engine == "both" else (engine,):
            rows += processes.submit(profile_rounds, name, devices, rounds).result()
    frame = pd.DataFrame(rows)
    frame.insert(0, "version", version)
    write_rows(out, frame)
    show(frame)


def show(frame: pd.DataFrame) -> None:
    """Print the parts of a round, and the three largest functions that are the plugin's."""
    console = Console(width=120)
    for engine, part in frame.groupby("engine", sort=False):
        whole = part.groupby("round")["round_seconds"].first()
        console.print(f"{part['version'].iloc[0]}, {engine}: {with_spread(whole)} s a round")
        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in ("part", "s", "share"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        seconds = part.groupby(["part", "round"])["seconds"].sum()
        for name in PARTS:
            if name in seconds:
                mean = seconds[name].mean()
                table.add_row(name, with_spread(seconds[name], ".3f"), f"{mean / whole.mean():.1%}")
        console.print(table)
        ours = part[~part["part"].isin([*USERS, "Flower", "Ray", "rest"])]
        largest = ours.groupby(["part", "function"])["seconds"].sum() / len(whole)
        for (name, function), mean in largest.nlargest(3).items():
            console.print(f"  ours: {function} ({name}) {mean:.3f} s, {mean / whole.mean():.1%}")


if __name__ == "__main__":
    typer.run(main)
