"""Devices that train at once against the same devices one after the other.

Sub-models of equal shapes, 50 to 150 samples a device, batches of 16, 3 epochs (one of ResNet18 on
a CPU, where it takes minutes as it is)::

    python -m benchmarks.stacked_training
    python -m benchmarks.stacked_training --device cuda --models resnet18 --together 25

- *stacked*: parameters of all devices in one tensor, a batched operation a layer
  (`benchmarks.stacked`);
- *captured* and *in turn* (on a GPU): every device's step captured as a CUDA graph and replayed
  (`benchmarks.captured`), on a stream a device, or all on one.

All start from the same weights and take the same steps; they are timed in turn, stacking, capturing
and moving included, and compared within a round. *Difference*: the largest of any parameter after
the first round, against its largest step. On a GPU convolutions use TF32 in all of them, as PyTorch
does by default. Aim: 25 sub-models of ResNet18 at least 5 times faster, on a GPU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.captured import train_captured
from benchmarks.stacked import train_stacked
from eclm_flower import modularize
from eclm_flower.modular import apply_policy
from simulations.models import build_model
from simulations.settings import Settings
from strategies.local_training import train

CLASSES = 10
Way = Callable[[list[nn.Module], list[TensorDataset], Settings, list[torch.Generator]], object]
SHAPES = {"mlp": (561,), "slim-resnet": (3, 32, 32), "resnet18": (3, 32, 32)}  # mlp: of HAPT
EPOCHS = 3


def main(
    models: Annotated[str, typer.Option(help="Comma separated.")] = ",".join(SHAPES),
    together: Annotated[str, typer.Option(help="Devices at once, comma separated.")] = "5,10,25",
    share: Annotated[float, typer.Option(help="Modules of a sub-model, in every layer.")] = 0.25,
    rounds: Annotated[int, typer.Option(help="Rounds, after one that warms up.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Channels last in memory, everywhere.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads, as one device has in simulations.")] = 1,
    out: Path = Path("benchmarks/results/stacked_training.csv"),
) -> None:
    """Compare stacked training with training one after the other."""
    torch.set_num_threads(threads)
    rows: list[dict[str, object]] = []
    for model in models.split(","):
        for k in (int(part) for part in together.split(",")):
            for row in measured(model, k, share, rounds, device, channels_last=channels_last):
                about = {"model": model, "together": k, "device": device, "threads": threads}
                rows.append({**about, "channels_last": channels_last, **row})
            frame = pd.DataFrame(rows)
            frame.to_csv(out, index=False)
    show(frame, f"At once against one after the other: {device}, {threads} thread(s)")


def measured(
    model: str, k: int, share: float, rounds: int, device: str, *, channels_last: bool = False
) -> list[dict[str, float | int]]:
    """Train in every way, round after round; a row for each round but the first, and each way."""
    start = sub_models(model, k, share, device)
    data = data_of(SHAPES[model], k, device)
    if channels_last and len(SHAPES[model]) == 3:
        for sub_model in start:
            sub_model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = Settings(local_epochs=1 if (model, device) == ("resnet18", "cpu") else EPOCHS)
    ways = ways_on(device)
    models = {way: copy.deepcopy(start) for way in ways}
    rows: list[dict[str, float | int]] = []
    difference = {}
    for number in range(rounds + 1):
        order = list(ways) if number % 2 else list(ways)[::-1]
        seconds = {}
        for way in order:
            generators = [torch.Generator().manual_seed(i) for i in range(k)]
            work = partial(ways[way], models[way], data, settings, generators)
            seconds[way] = timed(work, device)
        if number == 0:
            step = largest_step(models["one_by_one"], start)
            difference = {
                way: largest_step(models["one_by_one"], models[way]) / step for way in ways
            }
            continue
        for way in ways:
            if way != "one_by_one":
                rows.append(
                    {
                        "round": number,
                        "way": way,
                        "one_by_one_seconds": seconds["one_by_one"],
                        "seconds": seconds[way],
                        "difference": difference[way],
                    }
                )
    return rows


def ways_on(device: str) -> dict[str, Way]:
    """Ways to train; captured ones only where there is something to capture."""
    ways: dict[str, Way] = {
        "one_by_one": one_by_one,
        "stacked": partial(train_stacked, device=device),
    }
    if device != "cpu":
        ways["captured"] = train_captured
        ways["captured, in turn"] = partial(train_captured, streams=1)
    return ways


def one_by_one(
    models: list[nn.Module],
    data: list[TensorDataset],
    settings: Settings,
    generators: list[torch.Generator],
) -> None:
    """Train each alone."""
    for model, of_device, generator in zip(models, data, generators, strict=True):
        train(model, of_device, settings, generator)


def sub_models(name: str, k: int, share: float, device: str) -> list[nn.Module]:
    """Build sub-models of equal shapes, each of modules of its own choice."""
    shape = SHAPES[name]
    whole = modularize(
        build_model(name, shape, CLASSES, seed=0), example_input=torch.zeros(1, *shape)
    )
    random = torch.Generator().manual_seed(0)
    models = []
    for _ in range(k):
        selection = {
            layer.name: torch.randperm(layer.modules, generator=random)[
                : max(1, round(share * layer.modules))
            ].tolist()
            for layer in whole.layers.values()
        }
        models.append(apply_policy(whole.sub_model(selection), "frozen").to(device))
    return models


def data_of(shape: tuple[int, ...], k: int, device: str) -> list[TensorDataset]:
    """Make each device's samples."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.randint(50, 151, (k,), generator=random).tolist()
    return [
        TensorDataset(
            torch.randn(n, *shape, generator=random).to(device),
            torch.randint(CLASSES, (n,), generator=random).to(device),
        )
        for n in sizes
    ]


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that something takes, until the device is done with it."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def largest_step(models: list[nn.Module], others: list[nn.Module]) -> float:
    """Return the largest difference between any parameter of the one and of the other models."""
    return max(
        float((a - b).abs().max())
        for model, other in zip(models, others, strict=True)
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def show(frame: pd.DataFrame, title: str) -> None:
    """Print medians and extremes over rounds."""
    frame = frame.assign(faster=frame["one_by_one_seconds"] / frame["seconds"])
    table = Table(title=title)
    for heading in ("model", "devices", "way", "one by one, s", "at once, s", "faster"):
        table.add_column(heading, justify="right")
    table.add_column("difference", justify="right")
    for (model, k, way), part in frame.groupby(["model", "together", "way"], sort=False):
        ratio = part["faster"]
        table.add_row(
            str(model),
            str(k),
            str(way),
            f"{part['one_by_one_seconds'].median():.3f}",
            f"{part['seconds'].median():.3f}",
            f"{ratio.median():.2f}x ({ratio.min():.2f}-{ratio.max():.2f})",
            f"{part['difference'].iloc[0]:.0e}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
