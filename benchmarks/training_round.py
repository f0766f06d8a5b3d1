"""A round of training against a bare PyTorch loop that does the very same steps.

25 devices a round, each with 50 to 150 images and a sub-model of the slim CIFAR ResNet that fits
its budget, train 3 epochs of batches of 16, on one thread each::

    python -m benchmarks.training_round --out benchmarks/results/training_round.csv

A round is all of ECLM's: budgets are asked, sub-models derived, packed, sent, opened, trained,
returned and merged; in this process, and on Flower's simulation engine (Ray, one process a core).
The bare loop has the sub-models built and the data in memory before the clock starts. It follows
each round, and what is compared is a round with its own loop; the losses it ends with must be those
that the devices told, to the last digit. Mark: in this process at most 1.15 of the loop. The first
round is a row of its own: devices also decode their data.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import typer
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from rich.console import Console
from rich.table import Table
from torch import nn

from eclm_flower import ECLM, class_prior, receive
from eclm_flower.federation import MeteredGrid, run_in_process
from simulations.client_app import TRAIN, generator_of
from simulations.client_app import app as client_app
from simulations.settings import Engine, Settings
from simulations.strategy_run import run_config
from simulations.threads import one_thread
from simulations.world import World, world_of

MARK = 1.15
IMAGES = 8000  # of which the devices get some
SEED = 0


class RecordingGrid(MeteredGrid):
    """A grid that keeps the training requests of a round, and the losses that came back."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.requests: dict[int, Message] = {}  # node id -> request
        self.losses: dict[int, float] = {}  # node id -> mean loss of the last epoch
        self.devices: dict[int, int] = {}  # node id -> device

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep training requests."""
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == MessageType.TRAIN:
                self.requests[message.metadata.dst_node_id] = message
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Keep losses."""
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.metadata.message_type == MessageType.TRAIN:
                metrics = next(iter(reply.content.metric_records.values()))
                node = reply.metadata.src_node_id
                self.losses[node] = float(metrics["loss"])  # type: ignore[arg-type]
                self.devices[node] = int(metrics["device"])  # type: ignore[arg-type]
        return replies


def main(
    devices: Annotated[int, typer.Option(help="Devices, all of which train in a round.")] = 25,
    model: Annotated[str, typer.Option(help="slim-resnet, resnet18 or mlp.")] = "slim-resnet",
    rounds: Annotated[int, typer.Option(help="Rounds of each engine, after the first.")] = 7,
    engines: Annotated[str, typer.Option(help="Comma separated.")] = "in-process,ray",
    out: Path = Path("benchmarks/results/training_round.csv"),
) -> None:
    """Compare rounds of training with bare loops over the same steps."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        random = np.random.default_rng(SEED)
        np.savez(
            path,
            x=random.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8),
            y=random.integers(0, 10, IMAGES),
        )
        settings = Settings.suited(
            dataset=str(path),
            model=model,
            devices=devices,
            per_round=devices,
            classes_per_device=2,
            out=folder,
        )
        for engine in engines.split(","):
            assert engine in get_args(Engine), engine
            rows += run(settings, engine, rounds=1 + rounds)
            frame = pd.DataFrame(rows)
            frame.to_csv(out, index=False)
    show(frame, f"A round of {devices} devices, {model}")


def run(settings: Settings, engine: str, *, rounds: int) -> list[dict[str, object]]:
    """Run rounds on an engine, each followed by its bare loop."""
    world = world_of(settings.for_devices(), SEED)
    rows: list[dict[str, object]] = []
    server_app = ServerApp()

    @server_app.main()
    def server(grid: Grid, context: Context) -> None:
        config = run_config(settings, SEED, "eclm")
        strategy = ECLM(
            world.build_model(),
            query_config=config,
            min_train_nodes=settings.devices,
            min_available_nodes=settings.devices,
            fraction_evaluate=0.0,
        )
        recording = RecordingGrid(grid)
        began = 0.0

        def after_round(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            """Time the round that has ended, and its bare loop."""
            nonlocal began
            if number > 0:
                round_seconds = time.perf_counter() - began
                loop_seconds = bare_loops(recording, world)
                rows.append(
                    {
                        "engine": engine,
                        "round": number,
                        "round_seconds": round_seconds,
                        "loop_seconds": loop_seconds,
                    }
                )
            began = time.perf_counter()
            return None

        strategy.start(
            recording,
            ArrayRecord(strategy.model.state_dict()),
            num_rounds=rounds,
            train_config=config,
            evaluate_fn=after_round,
        )

    if engine == "in-process":
        run_in_process(server_app, client_app, settings.devices)
    else:
        run_simulation(
            server_app,
            client_app,
            num_supernodes=settings.devices,
            backend_config={
                "init_args": {"include_dashboard": False, "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    return rows


def bare_loops(recording: RecordingGrid, world: World) -> float:
    """Train a round's sub-models once more, without Flower or ECLM; returns seconds.

    Raises
    ------
    AssertionError
        A loss is not the one that the device told: these were not the same steps.
    """
    work = []
    for node, request in recording.requests.items():
        device = recording.devices[node]
        data = world.data(device, 0).train
        model = receive(request, world.model)
        work.append((node, model, data.tensors, generator_of(world.seed, device, 0, TRAIN)))
    losses = {}
    with one_thread():
        start = time.perf_counter()
        for node, model, (x, y), generator in work:
            with class_prior(model, y):
                losses[node] = bare_loop(model, x, y, world.settings, generator)
        seconds = time.perf_counter() - start
    assert losses == recording.losses, "The bare loop took other steps than the devices."
    return seconds


def bare_loop(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> float:
    """Train as anyone would; returns the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9)
    model.train()
    for _ in range(settings.local_epochs):
        loss_sum = 0.0
        for rows in torch.split(torch.randperm(len(x), generator=generator), settings.batch_size):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(rows)
    return loss_sum / len(x)


def show(frame: pd.DataFrame, title: str) -> None:
    """Print medians and quartiles over rounds, the ratio within a round."""
    frame = frame.assign(ratio=frame["round_seconds"] / frame["loop_seconds"])
    table = Table(title=title)
    for heading in ("engine", "rounds", "round, s", "bare loop, s", "round / loop", "mark"):
        table.add_column(heading)
    for engine in frame["engine"].unique():
        for first in (True, False):
            part = frame[(frame["engine"] == engine) & ((frame["round"] == 1) == first)]
            table.add_row(
                engine,
                "first" if first else f"{len(part)} more",
                *(_spread(part[name]) for name in ("round_seconds", "loop_seconds", "ratio")),
                f"<= {MARK}" if engine == "in-process" and not first else "",
            )
    Console(width=100).print(table)


def _spread(values: pd.Series) -> str:
    low, middle, high = values.quantile([0.25, 0.5, 0.75])
    return f"{middle:.2f}" if len(values) == 1 else f"{middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    typer.run(main)
