"""The ceiling test: how much specialising can gain on some data (not in the paper).

Asked before any device trains, and answered from proxy data alone. Every device gets the same
nested sub-model, of the modules that contribute most. Then ALL its weights are trained on, twice
for the same number of epochs: on the proxy data of everybody, and on that of the device's own
sub-tasks. Little data of one's own can harm more than it helps, so weights between the two are
tried as well, with one *degree* of specialising for all devices. What the best degree gains over
the shared weights, on held-out proxy data of the sub-tasks, is about the most that any way of
specialising can give.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from eclm_flower import PrototypingConfig, prototype
from eclm_flower.modular import ModularModel, apply_policy
from eclm_flower.prototyping.proxy import Augment, ProxyData
from eclm_flower.prototyping.stages import budget_of, train_network
from simulations.accuracies import accuracies
from simulations.augmentation import augmentation_of
from simulations.datasets import DataError
from simulations.offline import config_of
from simulations.proxy_parts import ProxyPart, split_proxy, sub_tasks_of_devices
from simulations.results import make_out_dir
from simulations.settings import Settings
from simulations.statistics import half_width
from simulations.world import World
from strategies.offline import prepare
from strategies.windows import numbers_within, window

ROWS = "ceiling.csv"
DEGREES = (0.25, 0.5, 0.75, 1.0)
LITTLE = 1.0  # point: what an interval below it may hold is called nothing


@dataclass(frozen=True, kw_only=True)
class CeilingRow:
    """A device's sub-tasks at one budget and degree; accuracies from 0 to 1, on held-out data.

    Attributes
    ----------
    seed : int
    share : float
        Of the modules.
    sub_tasks : str
        Numbers, with blanks between.
    samples : int
        Held-out samples of these sub-tasks.
    degree : float
        1: the weights trained on these sub-tasks alone; less: so far from the shared ones to these.
    shared, special : float
        Accuracy with the weights trained on the proxy data of everybody, and with special ones.
    shared_masked, special_masked : float
        With logits restricted to the classes of these sub-tasks.
    """

    seed: int
    share: float
    sub_tasks: str
    samples: int
    degree: float
    shared: float
    special: float
    shared_masked: float
    special_masked: float


def run_ceiling(
    settings: Settings, shares: Sequence[float], *, most_devices: int, console: Console
) -> pd.DataFrame:
    """Run the test for all seeds, print the answer and leave the rows in the settings' folder.

    Parameters
    ----------
    settings : Settings
        Data, environment, model and epochs; the rounds have no part in it.
    shares : sequence of float
        Budgets, as shares of the modules.
    most_devices : int
        How many devices of different sub-tasks are looked at, for each seed.
    console : Console
        Where the answer goes.
    """
    make_out_dir(settings)
    rows: list[CeilingRow] = []
    for seed in settings.seeds:
        world = World(settings, seed)
        rows += ceiling(world, shares, most_devices=most_devices, console=console)
    frame = pd.DataFrame([asdict(row) for row in rows])
    frame.to_csv(settings.out_dir / ROWS, index=False)
    show(frame, console)
    return frame


def ceiling(
    world: World, shares: Sequence[float], *, most_devices: int, console: Console
) -> list[CeilingRow]:
    """Run the test for one seed."""
    config = replace(config_of(world, world.settings), budget_shares=tuple(shares))
    augment = augmentation_of(world)
    train, held_out = split_proxy(world)
    kinds = list(dict.fromkeys(sub_tasks_of_devices(world)))[:most_devices]
    console.print(
        f"Seed {world.seed}: training the whole model and its nested sub-models on "
        f"{len(train.sub_tasks)} proxy samples."
    )
    model = trained_nested(world, train, config, augment)

    rows = []
    for share in shares:
        prefix = window(model.costs, numbers_within(model.costs, budget_of(model.costs, share)))
        shared = fine_tuned(model.sub_model(prefix), train, config, augment)
        what = f"budgets of {share:.1%}, {len(kinds)} devices"
        for sub_tasks in track(kinds, what, console=console, transient=True):
            own, test = train.of(sub_tasks), held_out.of(sub_tasks)
            if len(own.sub_tasks) == 0 or len(test.sub_tasks) == 0:
                continue
            classes = torch.unique(own.data.tensors[1]).tolist()
            special = fine_tuned(model.sub_model(prefix), own, config, augment)
            before = accuracies(shared, test.data, classes)
            for degree in DEGREES:
                after = accuracies(between(shared, special, degree), test.data, classes)
                row = CeilingRow(
                    seed=world.seed,
                    share=share,
                    sub_tasks=" ".join(map(str, sub_tasks)),
                    samples=len(test.sub_tasks),
                    degree=degree,
                    shared=before[0],
                    special=after[0],
                    shared_masked=before[1],
                    special_masked=after[1],
                )
                rows.append(row)
    if not rows:
        raise DataError(
            "Expected proxy data of the devices' sub-tasks to hold out, got too little."
        )
    return rows


def trained_nested(
    world: World, part: ProxyPart, config: PrototypingConfig, augment: Augment | None
) -> ModularModel:
    """Train the whole model and its nested sub-models, as the offline stage does for rivals."""
    model = world.build_model()
    whole_only = replace(config, enhancing_epochs=0, selector_epochs=0)
    options = {"sub_tasks": part.sub_tasks, "augment": augment}
    prototype(model, part.data, config=whole_only, **options)  # type: ignore[arg-type]
    prepare(model, part.data, offline="nested", config=config, **options)
    return model


def fine_tuned(
    sub_model: nn.Module, part: ProxyPart, config: PrototypingConfig, augment: Augment | None
) -> nn.Module:
    """Train all weights of a sub-model on, in place, as often as sub-models were trained before."""
    config = replace(
        config, epochs=config.enhancing_epochs, learning_rate=config.enhancing_learning_rate
    )
    data = ProxyData(part.data, part.sub_tasks, augment)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in train_network(apply_policy(sub_model, "frozen").train(), data, config, generator):
        pass
    return sub_model


@torch.no_grad()
def between(shared: nn.Module, special: nn.Module, degree: float) -> nn.Module:
    """Return a sub-model whose weights lie between two, 0: the first, 1: the second."""
    result = copy.deepcopy(shared)
    for parameter, other in zip(result.parameters(), special.parameters(), strict=True):
        parameter.lerp_(other, degree)
    return result


def gain_of(before: pd.Series[float], after: pd.Series[float]) -> tuple[float, float]:
    """Return the mean gain, paired, and the half-width of its 95 % interval (t), in points.

    Of less than two devices the half-width is infinite.
    """
    gain = (after - before) * 100
    return float(gain.mean()), half_width(gain)


def best_degree(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep, for each budget, the rows of the degree whose mean accuracy, masked, is largest."""
    mean = frame.groupby(["share", "degree"], as_index=False)["special_masked"].mean()
    best = mean.loc[mean.groupby("share")["special_masked"].idxmax(), ["share", "degree"]]
    return frame.merge(best)


def show(frame: pd.DataFrame, console: Console) -> None:
    """Print a table and, for each budget, a sentence."""
    table = Table(title="Accuracy on held-out proxy data, %")
    for heading in ("budget", "logits", "devices", "shared", "special", "degree", "gain"):
        table.add_column(heading, justify="left" if heading == "logits" else "right")
    for share, rows in best_degree(frame).groupby("share", sort=False):
        for logits, suffix in (("masked", "_masked"), ("all", "")):
            before, after = rows[f"shared{suffix}"], rows[f"special{suffix}"]
            gain, half = gain_of(before, after)
            table.add_row(
                f"{share:.1%}",
                logits,
                str(len(rows)),
                f"{before.mean():.1%}",
                f"{after.mean():.1%}",
                f"{rows['degree'].iloc[0]:g}",
                f"{gain:+.1f} ± {half:.1f}",
            )
    console.print(table)
    for share, rows in best_degree(frame).groupby("share", sort=False):
        console.print(f"At a budget of {share:.1%}: {verdict(rows)}")


def verdict(rows: pd.DataFrame) -> str:
    """Say in a sentence what specialising can gain at one budget."""
    gain, half = gain_of(rows["shared_masked"], rows["special_masked"])
    interval = f"({gain:+.1f} ± {half:.1f} points)"
    if gain - half > 0:
        result = f"specialising can gain up to about {gain:.1f} points {interval}."
    elif gain + half < LITTLE:
        result = f"there is nothing to gain from specialising {interval}."
    else:
        result = f"too few devices or samples to tell {interval}; look at more devices or seeds."
    plain, plain_half = gain_of(rows["shared"], rows["special"])
    if plain - plain_half > max(gain + half, 0):
        result += (
            f" Of the {plain:+.1f} over all logits, the rest comes for free: let a device choose "
            "among its own classes."
        )
    return result
