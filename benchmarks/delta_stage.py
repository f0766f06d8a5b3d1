"""How a number of further epochs is best divided: sub-models, then delta modules, and at what rate.

From one trained whole model, nested sub-models are trained as deployed; on top of them, in what is
left of the epochs, delta modules, once for each share and each rate. Judged is what `prototype`
itself judges by: the accuracy of simulated devices' sub-models on proxy data that nothing was
trained on, sub-tasks inferred. No device is asked and no test data touched::

    python -m benchmarks.delta_stage --data-dir DATA --seeds 1000 --out delta_stage.csv

The control gives all of the epochs to sub-models, and has no delta modules.
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
    enhancing_epochs: Annotated[str, typer.Option(help="Further epochs, all in all.")] = "4,12",
    delta_shares: Annotated[str, typer.Option(help="Of these, for delta modules.")] = "0.33,0.5",
    delta_rates: Annotated[str, typer.Option(help="Of delta modules.")] = "1,3",
    seeds: Annotated[str, typer.Option(help="Of none of the tables' runs.")] = "1000",
    whole_models: Annotated[
        Path | None, typer.Option(help="Folder that keeps trained whole models.")
    ] = None,
    out: Path = Path("delta_stage.csv"),
) -> None:
    """Search for the delta modules' share of the epochs and their rate."""
    shares, rates = (
        [float(part) for part in text.split(",")] for text in (delta_shares, delta_rates)
    )
    held = [float(share) for share in budgets.split(",")]
    rows: list[dict[str, object]] = []
    for seed in (int(part) for part in seeds.split(",")):
        settings = Settings.suited(
            dataset=dataset,
            data_dir=data_dir,
            resolution=resolution,
            feature_shift="known",
            views=views,
            epochs=epochs,
        )
        start = start_of(World(settings, seed), held, whole_models)
        for epochs_in_all in (int(number) for number in enhancing_epochs.split(",")):
            config = replace(start.config, enhancing_epochs=epochs_in_all)
            for row in searched(replace(start, config=config), shares, rates):
                rows.append({"seed": seed, "budgets": budgets, **row})
                print(rows[-1], flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows).to_csv(out, index=False)
    show(pd.DataFrame(rows))


def searched(start: Start, shares: list[float], rates: list[float]) -> Iterator[dict[str, object]]:
    """Yield the held-out accuracy of sub-models alone, and of each division at each rate."""
    for share in (0.0, *shares):
        config = replace(start.config, delta_share=share)
        nested = before_deltas(replace(start, config=config))
        about = {"enhancing_epochs": config.enhancing_epochs, "delta_epochs": config.delta_epochs}
        if config.delta_epochs == 0:
            yield {**about, "rate": 0.0, "accuracy": without_deltas(nested, start)}
            continue
        for rate in rates:
            model, config = copy.deepcopy(nested), replace(config, delta_rate=rate)
            generator = torch.Generator().manual_seed(config.seed)
            for _ in train_deltas(model, start.train, nested_choice(model), config, generator):
                pass
            scales = choose_scale(model.eval(), start.held_out, nested_choice(model), config)
            yield {**about, "rate": rate, "accuracy": max(scales.values())}


def without_deltas(model: ModularModel, start: Start) -> float:
    """Return the held-out accuracy of sub-models as they are without delta modules."""
    config = replace(start.config, delta_scales=(0.0,))
    judged = copy.deepcopy(model).eval()
    return choose_scale(judged, start.held_out, nested_choice(judged), config)[0.0]


def show(frame: pd.DataFrame) -> None:
    """Print a line for each division, a column for each rate."""
    table = Table("sub-models + delta modules", title="Accuracy on held-out proxy data, %, mean")
    accuracy = frame.pivot_table(
        index=["enhancing_epochs", "delta_epochs"], columns="rate", values="accuracy"
    )
    for rate in accuracy.columns:
        table.add_column(f"rate {rate:g}" if rate else "no delta modules", justify="right")
    for (together, deltas), row in accuracy.iterrows():  # type: ignore[misc]
        cells = ("" if pd.isna(value) else f"{value * 100:.1f}" for value in row)
        table.add_row(f"{together - deltas} + {deltas}", *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
