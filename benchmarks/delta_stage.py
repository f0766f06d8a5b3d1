"""How long and how fast delta modules should train: every pair of a grid, on held-out proxy data.

From one trained whole model, nested sub-models are trained as deployed; on top of them, delta
modules, once for each number of epochs and each rate. Judged is what `prototype` itself judges by:
the accuracy of simulated devices' sub-models on proxy data that nothing was trained on, sub-tasks
inferred. No device is asked and no test data touched::

    python -m benchmarks.delta_stage --data-dir DATA --seeds 1000 --out delta_stage.csv

The control is the row without delta modules whose sub-models trained on for as long instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.deltas import VIEWS, Start, before_deltas, nested_choice, start_of
from eclm_flower.modular import ModularModel
from eclm_flower.prototyping.delta_scale import choose_scale
from eclm_flower.prototyping.stages import train_deltas
from simulations.settings import Settings
from simulations.world import World


def main(
    dataset: str = "cifar10",
    data_dir: Annotated[str, typer.Option(help="Folder with cifar10/ in it.")] = "",
    resolution: Annotated[int, typer.Option(help="As in python -m simulations run.")] = 16,
    views: Annotated[str, typer.Option(help="Environments, one a device.")] = VIEWS,
    budgets: Annotated[str, typer.Option(help="Shares of the modules.")] = "0.25",
    epochs: Annotated[int, typer.Option(help="Of the whole model.")] = 8,
    enhancing_epochs: Annotated[int, typer.Option(help="Of sub-models.")] = 4,
    delta_epochs: Annotated[str, typer.Option(help="The grid's epochs.")] = "4,8,16",
    delta_rates: Annotated[str, typer.Option(help="The grid's rates.")] = "1,3,10",
    seeds: Annotated[str, typer.Option(help="Of none of the tables' runs.")] = "1000",
    whole_models: Annotated[
        Path | None, typer.Option(help="Folder that keeps trained whole models.")
    ] = None,
    out: Path = Path("delta_stage.csv"),
) -> None:
    """Search for the delta modules' epochs and rate."""
    lengths = [int(number) for number in delta_epochs.split(",")]
    grid = [(length, float(rate)) for length in lengths for rate in delta_rates.split(",")]
    shares = [float(share) for share in budgets.split(",")]
    rows: list[dict[str, object]] = []
    for seed in (int(part) for part in seeds.split(",")):
        settings = Settings.suited(
            dataset=dataset,
            data_dir=data_dir,
            resolution=resolution,
            feature_shift="known",
            views=views,
            epochs=epochs,
            enhancing_epochs=enhancing_epochs,
        )
        start = start_of(World(settings, seed), shares, whole_models)
        about = {"seed": seed, "budgets": budgets, "enhancing_epochs": enhancing_epochs}
        for row in searched(start, grid):
            rows.append({**about, **row})
            print(row, flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(out, index=False)
    show(pd.DataFrame(rows))


def searched(start: Start, grid: list[tuple[int, float]]) -> Iterator[dict[str, object]]:
    """Yield the held-out accuracy of each pair (epochs, rate), and of sub-models alone."""
    nested = before_deltas(start)
    yield {"epochs": 0, "rate": 0.0, "accuracy": without_deltas(nested, start)}
    for epochs, rate in grid:
        model = copy.deepcopy(nested)
        config = replace(start.config, delta_epochs=epochs, delta_rate=rate)
        generator = torch.Generator().manual_seed(config.seed)
        for _ in train_deltas(model, start.train, nested_choice(model), config, generator):
            pass
        scales = choose_scale(model.eval(), start.held_out, nested_choice(model), config)
        yield {"epochs": epochs, "rate": rate, "accuracy": max(scales.values())}
    for epochs in sorted({epochs for epochs, _ in grid}):
        together = start.config.enhancing_epochs + epochs
        longer = replace(start, config=replace(start.config, enhancing_epochs=together))
        accuracy = without_deltas(before_deltas(longer), start)
        yield {"epochs": epochs, "rate": 0.0, "accuracy": accuracy}


def without_deltas(model: ModularModel, start: Start) -> float:
    """Return the held-out accuracy of sub-models as they are without delta modules."""
    config = replace(start.config, delta_scales=(0.0,))
    judged = copy.deepcopy(model).eval()
    return choose_scale(judged, start.held_out, nested_choice(judged), config)[0.0]


def show(frame: pd.DataFrame) -> None:
    """Print a line for each number of epochs, a column for each rate."""
    table = Table("further epochs", title="Accuracy on held-out proxy data, %, mean over seeds")
    accuracy = frame.pivot_table(index="epochs", columns="rate", values="accuracy") * 100
    for rate in accuracy.columns:
        table.add_column(f"rate {rate:g}" if rate else "no delta modules", justify="right")
    for epochs, row in accuracy.iterrows():
        table.add_row(str(epochs), *("" if pd.isna(value) else f"{value:.1f}" for value in row))
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
