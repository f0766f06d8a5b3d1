"""What delta modules add to nested sub-models, and what it costs to take a device for another.

Offline stage only, no rounds. From one trained whole model, nested sub-models are trained as
deployed, then, on top of them, a difference for each sub-task (a view), whose scale is chosen on
held-out proxy data. Then every simulated device tests, on its own test data, the sub-model it would
be sent::

    python -m benchmarks.deltas --data-dir DATA --seeds 0,1 --out benchmarks/results/deltas.csv

A device's sub-tasks are unknown (it gets the *nested* sub-model), *true* (known), *wrong* (each
other sub-task in turn, mean accuracy), or inferred from its training data: from label counts, from
the importance of its modules, from the loss of every sub-task's sub-model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

from eclm_flower import PrototypingConfig, prototype
from eclm_flower.adaptation.sub_tasks import (
    mixture_from_importance,
    mixture_from_label_counts,
    mixture_from_losses,
)
from eclm_flower.modular import ModularModel, Selection
from eclm_flower.modular.deltas import Mixture, equal_mixture
from eclm_flower.modular.modes import evaluating
from eclm_flower.modular.selector import DELTAS
from eclm_flower.prototyping.delta_scale import choose_scale
from eclm_flower.prototyping.proxy import ProxyData
from eclm_flower.prototyping.stages import (
    Choice,
    budget_of,
    mean_gates,
    train_as_deployed,
    train_deltas,
    train_selector,
)
from simulations.accuracies import accuracies
from simulations.augmentation import augmentation_of
from simulations.ceiling import gain_of
from simulations.environment import DeviceData
from simulations.offline import config_of
from simulations.proxy_parts import split_proxy, sub_tasks_of_devices
from simulations.settings import Settings
from simulations.world import World
from strategies.offline import prepare
from strategies.windows import numbers_within, window

VIEWS = "plain,negative,rotation,noise,brightness,blur,contrast,occlusion"
INFERRED = ("label counts", "importance", "local losses")


def main(
    dataset: str = "cifar10",
    data_dir: Annotated[str, typer.Option(help="Folder with cifar10/ in it.")] = "",
    resolution: Annotated[int, typer.Option(help="As in python -m simulations run.")] = 0,
    model: Annotated[str, typer.Option(help="The same.")] = "auto",
    views: Annotated[str, typer.Option(help="Environments, one a device.")] = VIEWS,
    devices: int = 40,
    budgets: Annotated[str, typer.Option(help="Shares of the modules.")] = "0.25,0.125",
    epochs: Annotated[int, typer.Option(help="Of the whole model; -1: as suits the data.")] = -1,
    enhancing_epochs: Annotated[int, typer.Option(help="Of sub-models; -1: as suits.")] = -1,
    seeds: str = "0,1",
    whole_models: Annotated[
        Path | None, typer.Option(help="Folder that keeps trained whole models.")
    ] = None,
    out: Path = Path("deltas.csv"),
) -> None:
    """Compare nested sub-models without and with delta modules."""
    rows: list[dict[str, object]] = []
    shares = [float(share) for share in budgets.split(",")]
    for seed in (int(part) for part in seeds.split(",")):
        settings = Settings.suited(
            dataset=dataset,
            data_dir=data_dir,
            resolution=resolution,
            model=model,
            devices=devices,
            classes_per_device=0,
            feature_shift="known",
            views=views,
            epochs=epochs,
            enhancing_epochs=enhancing_epochs,
        )
        start = start_of(World(settings, seed), shares, whole_models)
        nested = trained(start)
        scales = choose_scale(nested, start.held_out, nested_choice(nested), start.config)
        print(f"Seed {seed}: accuracy on held-out proxy data by scale: {scales}", flush=True)
        scale = max(scales, key=lambda scale: scales[scale])
        for row in tested(start, nested):
            rows.append({"seed": seed, "scale": scale, **row})
        out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(out, index=False)
    show(pd.DataFrame(rows))


@dataclass(frozen=True, kw_only=True)
class Start:
    """What all ways have in common: one seed, its data, the trained whole model."""

    world: World
    config: PrototypingConfig
    train: ProxyData
    held_out: ProxyData
    whole: ModularModel


def start_of(world: World, shares: Sequence[float], folder: Path | None) -> Start:
    """Train the whole model, or read it from a folder, and put what contributes most first."""
    config = replace(config_of(world, world.settings), budget_shares=tuple(shares))
    augment = augmentation_of(world)
    train, held_out = split_proxy(world)
    options = {"sub_tasks": train.sub_tasks, "augment": augment}
    whole = world.build_model()
    settings = hashlib.sha256(world.settings.to_json().encode()).hexdigest()[:12]
    path = folder / f"{settings}-{world.seed}.safetensors" if folder else None
    if path is not None and path.exists():
        whole.load_state_dict(load_file(path))
    else:
        alone = replace(config, enhancing_epochs=0, selector_epochs=0)
        prototype(whole, train.data, config=alone, **options)  # type: ignore[arg-type]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: t.contiguous() for k, t in whole.state_dict().items()}, path)
    order_only = replace(config, enhancing_epochs=0)
    prepare(whole, train.data, offline="nested", config=order_only, **options)
    return Start(
        world=world,
        config=config,
        train=ProxyData(train.data, train.sub_tasks, augment),
        held_out=ProxyData(held_out.data, held_out.sub_tasks),
        whole=whole,
    )


def nested_choice(model: ModularModel) -> Choice:
    """Give simulated devices the prefix that their budget allows."""
    return lambda _, budget, __: window(model.costs, numbers_within(model.costs, budget))


def trained(start: Start) -> ModularModel:
    """Train nested sub-models as deployed, deltas on top, and a selector of sub-tasks."""
    model = before_deltas(start)
    generator = torch.Generator().manual_seed(start.config.seed)
    choose = nested_choice(model)
    for loss in train_deltas(model, start.train, choose, start.config, generator):
        print(f"  delta modules: loss {loss:.3f}", flush=True)
    return model.eval()


def before_deltas(start: Start) -> ModularModel:
    """Train nested sub-models as deployed and a selector of sub-tasks; deltas are zero yet."""
    model = copy.deepcopy(start.whole)
    deltas = model.add_deltas()
    generator = torch.Generator().manual_seed(start.config.seed)
    targets = {DELTAS: torch.eye(model.sub_tasks)}
    for _ in train_selector(model, start.train, targets, start.config, generator):
        pass
    deltas.gates.copy_(torch.from_numpy(mean_gates(model.selector, start.train)[DELTAS]))
    choose, config = nested_choice(model), start.config
    epochs = config.enhancing_epochs - config.delta_epochs
    for loss in train_as_deployed(model, start.train, choose, config, generator, epochs=epochs):
        print(f"  nested sub-models: loss {loss:.3f}", flush=True)
    return model


@torch.no_grad()
def as_sent(model: ModularModel, selection: Selection, mixture: Mixture) -> nn.Module:
    """Build the sub-model of a device of some sub-tasks."""
    assert model.deltas is not None
    result = model.sub_model(selection)
    for key, difference in model.deltas.difference(selection, mixture).items():
        result.get_parameter(key).add_(difference)
    return result


def tested(start: Start, model: ModularModel) -> Iterator[dict[str, object]]:
    """Yield the accuracy of each device at each budget, for every way to tell its sub-tasks."""
    assert model.deltas is not None
    number, gates = model.sub_tasks, {DELTAS: model.deltas.gates.numpy()}
    labels = start.train.data.tensors[1]  # type: ignore[attr-defined]
    label_counts = np.zeros((number, start.world.environment.num_classes))
    np.add.at(label_counts, (start.train.sub_tasks.numpy(), labels.numpy()), 1)
    for share in start.config.budget_shares:
        prefix = window(model.costs, numbers_within(model.costs, budget_of(model.costs, share)))
        candidates = [
            as_sent(model, prefix, equal_mixture([sub_task], number)) for sub_task in range(number)
        ]
        for device, own in enumerate(sub_tasks_of_devices(start.world)):
            data = start.world.data(device, 0)
            x, y = data.train.tensors
            mixtures = {
                "true": equal_mixture(own, number).numpy(),
                "label counts": mixture_from_label_counts(
                    np.bincount(y, minlength=label_counts.shape[1]), label_counts
                ),
                "importance": mixture_from_importance(model.importance([x]), gates),
                "local losses": mixture_from_losses(losses(candidates, data), len(y)),
            }
            common = {"share": share, "device": device, "sub_tasks": " ".join(map(str, own))}
            models = {"nested": model.sub_model(prefix)} | {
                name: as_sent(model, prefix, torch.from_numpy(mixture))
                for name, mixture in mixtures.items()
            }
            for name, sub_model in models.items():
                accuracy, masked = accuracies(sub_model, data.test, data.classes)
                right = int(np.argmax(mixtures[name])) in own if name in INFERRED else None
                yield {
                    **common,
                    "told": name,
                    "right": right,
                    "accuracy": accuracy,
                    "masked": masked,
                }
            others = [candidates[other] for other in range(number) if other not in own]
            results = [accuracies(other, data.test, data.classes) for other in others]
            accuracy, masked = np.mean(results, axis=0)
            yield {**common, "told": "wrong", "accuracy": accuracy, "masked": masked}


@torch.no_grad()
def losses(candidates: Sequence[torch.nn.Module], data: DeviceData) -> np.ndarray:
    """Return the loss of each candidate on a device's training data."""
    x, y = data.train.tensors
    result = []
    for candidate in candidates:
        with evaluating(candidate):
            result.append(float(F.cross_entropy(candidate(x), y)))
    return np.array(result)


def show(frame: pd.DataFrame) -> None:
    """Print what each way gains over nested, paired by device, and how often it guesses right."""
    devices = frame[["seed", "device"]].drop_duplicates()
    title = f"{frame['seed'].nunique()} seeds, {len(devices)} devices, 95 % intervals, %"
    table = Table("budget", "sub-tasks", title=f"Accuracy on the devices' own test data, {title}")
    headings = ("right", "accuracy", "gain", "masked", "gain, masked", "worst decile", "gain")
    for heading in headings:
        table.add_column(heading, justify="right")
    frame = frame.set_index(["seed", "device"])
    for share, rows in frame.groupby("share", sort=False):
        nested = rows[rows["told"] == "nested"]
        for told in ("nested", "true", *INFERRED, "wrong"):
            own = rows[rows["told"] == told]
            cells = []
            for column in ("accuracy", "masked"):
                gain, half = gain_of(nested[column], own[column])
                cells += [f"{own[column].mean():.1%}", f"{gain:+.1f} ± {half:.1f}"]
            worst, before = (worst_decile(each["accuracy"]) for each in (own, nested))
            table.add_row(
                f"{share:.1%}",
                told,
                f"{own['right'].astype(float).mean():.0%}" if told in INFERRED else "",
                *cells,
                f"{worst:.1%}",
                f"{(worst - before) * 100:+.1f}",
            )
    Console(width=120).print(table)


def worst_decile(accuracy: pd.Series) -> float:
    """Mean accuracy of the worst tenth of the devices, at least one."""
    return float(accuracy.nsmallest(max(1, len(accuracy) // 10)).mean())


if __name__ == "__main__":
    typer.run(main)
