"""What a large fleet costs the server: 10,000 registered devices in process, and a million.

A model of 4 layers of 16 modules, ECLM's own strategy, trivial training::

    python -m benchmarks.fleet_size                                        # 10,000 in process
    python -m benchmarks.fleet_size --devices 1000000 --per-round 1000 --nodes answering

*in-process* nodes run a real ClientApp on `InProcessGrid`; *answering* nodes are a load generator,
a function without ClientApp or context (`benchmarks.answering_grid`). Each repetition is a process
of its own. Before the rounds every device tells its profile and has a selection remembered, as if
it had been asked once. Reported:

- *start*: until every node has said who it is. *Ours*, here and below: without the ClientApps and
  the grid, which copies messages;
- *a round* after the first, and its parts;
- *memory a device*: growth of the process's resident memory from the grid to the end. What the
  nodes keep (*grid*) is not the server's; in process it grows by what is left of their work. Beside
  it what is freed, in resident memory and in Python's objects (`tracemalloc`, in a run of its own),
  when the strategy forgets the devices;
- *checkpoint* of that state: bytes, seconds to write and to read.

Marks for 10,000 devices, 100 a round: 5 KB a device, 10 s to start, 1 s a round.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.answering_grid import AnsweringGrid
from benchmarks.costs import resident
from benchmarks.process_memory import memory_now
from benchmarks.stopwatch import Stopwatch
from benchmarks.versioned_rows import RESULTS, with_spread, write_rows
from eclm_flower import ECLM, Budget, modularize, profile, receive, reply
from eclm_flower.federation import InProcessGrid, requests, rounds
from eclm_flower.federation.checkpoint import CheckpointFolder
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.exchange import Deadline
from eclm_flower.federation.profiles import Profiles
from eclm_flower.federation.roster import Roster
from eclm_flower.federation.run_state import RunState, from_checkpoint, to_checkpoint
from eclm_flower.federation.traffic import Traffic
from eclm_flower.modular import ModularModel

FEATURES, HIDDEN, LAYERS, MODULES, SHARE = 16, 64, 4, 16, 0.25
THEIRS = ("grid", "client apps")
MARKS = {"memory a device": 5_000, "start": 10, "a round": 1}


class Perceptrons(nn.Module):
    """Small residual perceptrons: what travels is not what is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, FEATURES))
            for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, 16]`` to the same shape."""
        for block in self.blocks:
            x = x + block(x)
        return x


def build_model() -> ModularModel:
    """Build the cloud model."""
    torch.manual_seed(0)
    model = modularize(
        Perceptrons(), modules_per_layer=MODULES, example_input=torch.zeros(1, FEATURES)
    )
    torch.nn.init.normal_(model.selector.heads.weight)  # else nobody is asked for importance
    return model


def trivial_app(model: ModularModel, budget: Budget) -> ClientApp:
    """Build a ClientApp that returns its sub-model as it came."""
    app = ClientApp()

    @app.query()
    def query(msg: Message, context: Context) -> Message:
        seed = int(context.node_config["partition-id"])
        data = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(seed))
        return profile(msg, context, model, [data], budget=budget)

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        return reply(msg, receive(msg, model), num_examples=10)

    return app


def measure(
    *, devices: int, per_round: int, nodes: str, number_of_rounds: int, traced: bool
) -> dict[str, float]:
    """Run a federation in this process; return what it cost, in seconds and bytes.

    Parameters
    ----------
    devices, per_round : int
        Registered, and asked to train in a round.
    nodes : {"in-process", "answering"}
        What the nodes are.
    number_of_rounds : int
        The first is not reported.
    traced : bool
        Count the bytes that Python objects take (`tracemalloc`), which makes all times too long.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model = build_model()
    budget = Budget.share_of(model.costs, communication_bytes=SHARE)
    watch = Stopwatch()

    def grid_of(number: int) -> Grid:
        if nodes == "answering":
            return AnsweringGrid(model, number, budget)
        app = watch.timed("client apps", trivial_app(model, budget))
        return InProcessGrid(app, number)  # type: ignore[arg-type]

    _run(_strategy(model, 50, 50), grid_of(50), 2)  # what every process pays once
    before = memory_now()
    grid = grid_of(devices)
    figures = {"grid: bytes a node": (memory_now() - before) / devices}
    _watch_parts(watch, grid)
    strategy = _strategy(model, devices, per_round)
    if traced:
        tracemalloc.start()

    before = memory_now()
    watch.seconds.clear()
    start = time.perf_counter()
    strategy.roster.refresh(grid, at_least=devices, timeout=3600)
    figures["start"] = time.perf_counter() - start
    figures["start: ours"] = figures["start"] - _theirs(watch)
    figures["start: peak bytes a device"] = (resident("VmHWM") - before) / devices

    figures["all tell their profile: ours"] = _everyone_tells(strategy, grid, watch)
    _everyone_is_sent_modules(strategy)

    parts = _rounds(strategy, grid, watch, number_of_rounds)
    figures["a round"] = sum(parts.values())
    figures["a round: ours"] = sum(s for part, s in parts.items() if part not in THEIRS)
    figures.update({f"a round: {part}": seconds for part, seconds in parts.items()})
    figures["memory a device"] = (memory_now() - before) / devices
    figures.update(_checkpoint(strategy, model))
    figures.update(_freed(strategy, devices, traced=traced))
    return figures


def _watch_parts(watch: Stopwatch, grid: Grid) -> None:
    for name in ("push_messages", "pull_messages", "get_node_ids"):
        watch.watch(grid, name, "grid")
    watch.watch(Roster, "wait", "node list")
    watch.watch(Roster, "greet", "node list")
    watch.watch(Roster, "sample", "draw")
    watch.watch(Profiles, "update", "queries")
    watch.watch(ECLM, "derive", "derivation")
    watch.watch(CloudModel, "pack", "packing")
    watch.watch(requests, "_packed", "packing")
    watch.watch(rounds, "stream", "exchange")
    watch.watch(ECLM, "aggregate_train", "merge")


def _theirs(watch: Stopwatch) -> float:
    return sum(watch.seconds[part] for part in THEIRS)


def _strategy(model: ModularModel, devices: int, per_round: int) -> ECLM:
    return ECLM(
        model,
        fraction_train=per_round / devices,
        fraction_evaluate=0.0,
        min_train_nodes=1,
        min_available_nodes=devices,
    )


def _run(
    strategy: ECLM,
    grid: Grid,
    number_of_rounds: int,
    end_of_round: Callable[[int, ArrayRecord], None] | None = None,
) -> None:
    strategy.start(
        grid,
        ArrayRecord(strategy.model.state_dict()),
        num_rounds=number_of_rounds,
        evaluate_fn=end_of_round,
    )


def _rounds(strategy: ECLM, grid: Grid, watch: Stopwatch, number: int) -> dict[str, float]:
    """Run rounds; seconds of one by part, means over all but the first."""

    def end_of_round(server_round: int, arrays: ArrayRecord) -> None:
        if server_round == 1:
            watch.seconds.clear()

    with watch.timing("the rest"):
        _run(strategy, grid, number, end_of_round)
    return {part: seconds / (number - 1) for part, seconds in watch.seconds.items()}


def _everyone_tells(strategy: ECLM, grid: Grid, watch: Stopwatch) -> float:
    """Ask every device for its profile, as if all had been drawn; seconds that are ours."""
    strategy.take_over(ArrayRecord(strategy.model.state_dict()), 1)
    watch.seconds.clear()
    start = time.perf_counter()
    losses = strategy.told.update(
        grid,
        strategy.roster.node_ids,
        0,
        lambda selector: requests._question(strategy, selector),
        strategy.cloud.selector_arrays,
        until=Deadline.after(3600),
        costs=strategy.model.costs,
        traffic=Traffic(),
    )
    if losses or len(strategy.profiles) != len(strategy.roster.node_ids):
        raise RuntimeError(f"Expected a profile of every device, lost {losses}.")
    return time.perf_counter() - start - _theirs(watch)


def _everyone_is_sent_modules(strategy: ECLM) -> None:
    """Remember a selection of each device: the best quarter of each layer."""
    for device, told in strategy.profiles.items():
        strategy.selections[device] = {
            name: tuple(sorted(np.argsort(-importance)[: MODULES // 4].tolist()))
            for name, importance in told.importance.items()
        }


def _checkpoint(strategy: ECLM, model: ModularModel) -> dict[str, float]:
    """Write and read a checkpoint of the state."""
    from flwr.serverapp.strategy import Result

    with tempfile.TemporaryDirectory() as name:
        folder = CheckpointFolder(name)
        start = time.perf_counter()
        state = RunState(
            server_round=1,
            cloud=strategy.merged,
            told=strategy.told,
            selections=strategy.selections,
            result=Result(),
            initial="",
            usual=strategy.usual,
        )
        path = folder.save(to_checkpoint(state, strategy.settings()))
        written = time.perf_counter() - start
        assert path is not None
        size = sum(file.stat().st_size for file in path.iterdir())
        start = time.perf_counter()
        checkpoint = folder.load()
        assert checkpoint is not None
        read = from_checkpoint(checkpoint, model, strategy.told)
        seconds = time.perf_counter() - start
        if len(read.told.latest) != len(strategy.profiles):
            raise RuntimeError("The checkpoint lacks devices.")
    devices = len(strategy.profiles)
    return {
        "checkpoint: bytes a device": size / devices,
        "checkpoint: written": written,
        "checkpoint: read": seconds,
    }


def _freed(strategy: ECLM, devices: int, *, traced: bool) -> dict[str, float]:
    """Drop what the strategy knows of devices; bytes a device that this frees."""
    gc.collect()
    with_it, objects = memory_now(), tracemalloc.get_traced_memory()[0]
    strategy.roster = Roster(0)
    strategy.told = Profiles(importance_every=None)
    strategy.selections = {}
    gc.collect()
    figures = {"memory a device: freed": (with_it - memory_now()) / devices}
    if traced:
        figures = {
            "memory a device: Python objects": (objects - tracemalloc.get_traced_memory()[0])
            / devices
        }
    return figures


def main(
    devices: Annotated[int, typer.Option(help="Registered.")] = 10_000,
    per_round: Annotated[int, typer.Option(help="Asked to train.")] = 100,
    nodes: Annotated[str, typer.Option(help="in-process or answering.")] = "in-process",
    number_of_rounds: Annotated[int, typer.Option("--rounds", help="The first isn't counted.")] = 6,
    repetitions: Annotated[int, typer.Option(help="Runs, each in a process of its own.")] = 3,
    version: Annotated[str, typer.Option(help="Of the code, noted in the rows.")] = "after",
    out: Annotated[Path, typer.Option(help="A CSV file.")] = RESULTS / "fleet_size.csv",
) -> None:
    """Measure a fleet."""
    case = {"devices": devices, "per_round": per_round, "nodes": nodes}
    rows: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for repetition in range(repetitions):
            figures = processes.submit(
                measure, **case, number_of_rounds=number_of_rounds, traced=False
            ).result()
            rows += [
                {
                    "version": f"{version}, {devices} {nodes}",
                    **case,
                    "repetition": repetition,
                    "figure": figure,
                    "value": value,
                }
                for figure, value in figures.items()
            ]
            write_rows(out, pd.DataFrame(rows))  # a million takes long
        if devices <= 20_000:  # slow, and exact: once is enough
            figures = processes.submit(measure, **case, number_of_rounds=2, traced=True).result()
            figure = "memory a device: Python objects"
            rows.append({**rows[-1], "repetition": 0, "figure": figure, "value": figures[figure]})
    frame = pd.DataFrame(rows)
    write_rows(out, frame)
    show(frame)


def show(frame: pd.DataFrame) -> None:
    """Print each figure with its spread."""
    case = frame.iloc[0]
    table = Table(
        title=f"{case['devices']:,} devices ({case['nodes']}), {case['per_round']:,} a round"
    )
    table.add_column("figure", no_wrap=True)
    table.add_column("median (least-most)", justify="right")
    table.add_column("", no_wrap=True)
    for figure, values in frame.groupby("figure", sort=False)["value"]:
        is_bytes = "byte" in str(figure) or "memory" in str(figure)
        table.add_row(
            str(figure),
            with_spread(values.to_numpy(), ",.0f" if is_bytes else ".3f"),
            "bytes" if is_bytes else "s",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
