"""Devices that train at once, stacked, against the same devices one after the other.

Sub-models of equal shapes, 50 to 150 samples a device, 3 epochs of batches of 16 (one of ResNet18,
which takes minutes on a CPU as it is)::

    python -m benchmarks.stacked_training
    python -m benchmarks.stacked_training --device cuda

Both ways start from the same weights and take the same steps (`benchmarks.stacked`); they are
timed in turn, stacking included, and compared within a round. *Difference*: the largest of any
parameter after the first round, against its largest step. Aim: 25 sub-models of ResNet18 at least
5 times faster, on a GPU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.stacked import train_stacked
from eclm_flower import modularize
from eclm_flower.modular import apply_policy
from simulations.models import build_model
from simulations.settings import Settings
from strategies.local_training import train

CLASSES = 10
SHAPES = {"mlp": (561,), "slim-resnet": (3, 32, 32), "resnet18": (3, 32, 32)}  # mlp: of HAPT
EPOCHS = {"mlp": 3, "slim-resnet": 3, "resnet18": 1}


def main(
    models: Annotated[str, typer.Option(help="Comma separated.")] = ",".join(SHAPES),
    together: Annotated[str, typer.Option(help="Devices at once, comma separated.")] = "5,10,25",
    share: Annotated[float, typer.Option(help="Modules of a sub-model, in every layer.")] = 0.25,
    rounds: Annotated[int, typer.Option(help="Rounds, after one that warms up.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads, as one device has in simulations.")] = 1,
    out: Path = Path("benchmarks/results/stacked_training.csv"),
) -> None:
    """Compare stacked training with training one after the other."""
    torch.set_num_threads(threads)
    rows: list[dict[str, object]] = []
    for model in models.split(","):
        for k in (int(part) for part in together.split(",")):
            for row in measured(model, k, share, rounds, device):
                rows.append({"model": model, "together": k, "device": device, **row})
            frame = pd.DataFrame(rows)
            frame.to_csv(out, index=False)
    show(frame, f"Stacked against one after the other: {device}, {threads} thread(s)")


def measured(
    model: str, k: int, share: float, rounds: int, device: str
) -> list[dict[str, float | int]]:
    """Train both ways, round after round; a row for each round but the first."""
    one_by_one = sub_models(model, k, share, device)
    stacked = copy.deepcopy(one_by_one)
    start = copy.deepcopy(one_by_one)
    data = data_of(SHAPES[model], k, device)
    settings = Settings(local_epochs=EPOCHS[model])
    rows: list[dict[str, float | int]] = []
    difference = 0.0
    for number in range(rounds + 1):
        generators = [[torch.Generator().manual_seed(i) for i in range(k)] for _ in range(2)]

        def each(own: list[torch.Generator] = generators[0]) -> None:
            for sub_model, of_device, generator in zip(one_by_one, data, own, strict=True):
                train(sub_model, of_device, settings, generator)

        def at_once(own: list[torch.Generator] = generators[1]) -> None:
            train_stacked(stacked, data, settings, own, device=device)

        if number % 2:
            seconds = {work: timed(work, device) for work in (at_once, each)}
        else:
            seconds = {work: timed(work, device) for work in (each, at_once)}
        if number == 0:
            difference = largest_step(one_by_one, stacked) / largest_step(one_by_one, start)
            continue
        rows.append(
            {
                "round": number,
                "one_by_one_seconds": seconds[each],
                "stacked_seconds": seconds[at_once],
                "difference": difference,
            }
        )
    return rows


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


def timed(work: Callable[[], None], device: str) -> float:
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
    frame = frame.assign(faster=frame["one_by_one_seconds"] / frame["stacked_seconds"])
    table = Table(title=title)
    for heading in ("model", "devices", "one by one, s", "stacked, s", "faster", "difference"):
        table.add_column(heading, justify="right")
    for (model, k), part in frame.groupby(["model", "together"], sort=False):
        ratio = part["faster"]
        table.add_row(
            str(model),
            str(k),
            f"{part['one_by_one_seconds'].median():.3f}",
            f"{part['stacked_seconds'].median():.3f}",
            f"{ratio.median():.2f}x ({ratio.min():.2f}-{ratio.max():.2f})",
            f"{part['difference'].iloc[0]:.0e}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
