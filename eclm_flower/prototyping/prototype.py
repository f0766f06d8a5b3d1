"""The whole offline stage in one call (paper section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from eclm_flower.adaptation.profile import Budget
from eclm_flower.errors import PrototypingError
from eclm_flower.modular.costs import CostTable
from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.modes import evaluating
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.selector import DELTAS
from eclm_flower.prototyping.assignment import assign, gate_targets
from eclm_flower.prototyping.config import PrototypingConfig
from eclm_flower.prototyping.delta_scale import choose_scale
from eclm_flower.prototyping.grouping import order_units, unit_responses
from eclm_flower.prototyping.proxy import Augment, ProxyData, device_of
from eclm_flower.prototyping.stages import (
    Stage,
    by_importance,
    enhance_abilities,
    mean_gates,
    train_as_deployed,
    train_deltas,
    train_end_to_end,
    train_selector,
    train_whole,
)

SubModels = Callable[[CostTable, Budget, np.random.Generator], Selection]
"""(costs, budget, random numbers) -> a sub-model, whatever the device's data."""


@dataclass(kw_only=True)
class PrototypingReport:
    """What the offline stage did.

    Attributes
    ----------
    losses : dict[str, list[float]]
        Stage -> mean loss of each epoch.
    accuracy : dict[str, float]
        Stage -> accuracy of the whole model on the validation data after it (if any was given).
    assignment : dict[str, np.ndarray]
        Layer name -> bool ``[T, N]``: which modules serve which sub-tasks; of layers whose modules
        are chosen.
    delta_scales : dict[float, float]
        Scale of the delta modules -> accuracy of sub-models as deployed, on held-out proxy data;
        the best was taken. Empty without delta modules.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    assignment: dict[str, np.ndarray] = field(default_factory=dict)
    delta_scales: dict[float, float] = field(default_factory=dict)


def prototype(
    model: ModularModel,
    data: Dataset[Any],
    *,
    sub_tasks: Sequence[int] | Tensor,
    config: PrototypingConfig | None = None,
    validation: Dataset[Any] | None = None,
    augment: Augment | None = None,
    sub_models: SubModels | None = None,
    progress: bool = True,
) -> PrototypingReport:
    """Prepare the cloud model on proxy data, in place: modules specialise, the selector learns.

    Runs where the model is; random numbers are drawn on the CPU, so they are the same everywhere.

    Parameters
    ----------
    model : ModularModel
        From `modularize`.
    data : Dataset
        Labelled proxy data, map-style, yields ``(x, y)``.
    sub_tasks : sequence of int or Tensor
        Sub-task of each sample, from 0: its label under label skew, its environment under feature
        skew, or whatever tells apart what different devices see.
    config : PrototypingConfig, optional
        All further choices.
    validation : Dataset, optional
        Held-out ``(x, y)`` to report the whole model's accuracy on after each stage.
    augment : callable, optional
        ``(x [B, ...], torch.Generator) -> x``, applied to training batches.
    sub_models : callable, optional
        Which sub-models devices will hold, if it isn't the selector that chooses them: units are
        then ordered by what they contribute, and the selector is left as it is. For strategies
        other than ECLM, with ``method="deployed"``.
    progress : bool (default: True)
        Show a progress bar on the terminal.

    Raises
    ------
    PrototypingError
        Data, sub-tasks or parameters don't fit together.
    """
    config = config or PrototypingConfig()
    proxy = ProxyData(data, sub_tasks, augment, device=device_of(model))
    needed = "selector" if config.method == "paper" else "uniform"
    if model.gating != needed:
        raise PrototypingError(
            f"Expected a model of gating {needed!r} for method {config.method!r}, got "
            f"{model.gating!r}; choose it in modularize(..., gating={needed!r})."
        )
    if sub_models is not None and config.method == "paper":
        raise PrototypingError("Expected method 'deployed' to train given sub_models, got 'paper'.")
    report = PrototypingReport()
    generator = torch.Generator().manual_seed(config.seed)

    with Progress(disable=not progress) as bar:

        def run(name: str, stage: Stage, epochs: int) -> None:
            if epochs == 0:
                return
            task = bar.add_task(name, total=epochs)
            report.losses[name] = []
            for loss in stage:
                report.losses[name].append(loss)
                bar.update(task, advance=1, description=f"{name} (loss {loss:.3f})")
            if validation is not None:
                report.accuracy[name] = accuracy(model, validation)
                whole = f"{name} (accuracy of the whole model {report.accuracy[name]:.1%})"
                bar.update(task, description=whole)
            if not math.isfinite(report.losses[name][-1]):
                raise PrototypingError(
                    f"The loss of stage '{name}' is not finite; lower its learning rate."
                )

        if config.method == "paper":
            _as_in_the_paper(model, proxy, config, generator, report, run)
        elif sub_models is not None:
            _as_given(model, proxy, sub_models, config, generator, run)
        else:
            _as_deployed(model, proxy, config, generator, report, run)
    model.eval()
    return report


Run = Callable[[str, Stage, int], None]


def _as_in_the_paper(
    model: ModularModel,
    proxy: ProxyData,
    config: PrototypingConfig,
    generator: torch.Generator,
    report: PrototypingReport,
    run: Run,
) -> None:
    run("end-to-end", train_end_to_end(model, proxy, config, generator), config.epochs)
    load = mean_gates(model.selector, proxy, top_k=model.top_k)
    targets = {}
    for name, layer_load in load.items():
        report.assignment[name] = _assign(layer_load, 0, config)
        targets[name] = torch.from_numpy(gate_targets(layer_load, report.assignment[name]))
    run(
        "ability enhancing",
        enhance_abilities(model, proxy, targets, config, generator),
        config.enhancing_epochs,
    )


def _as_deployed(
    model: ModularModel,
    proxy: ProxyData,
    config: PrototypingConfig,
    generator: torch.Generator,
    report: PrototypingReport,
    run: Run,
) -> None:
    run("whole model", train_whole(model, proxy, config, generator), config.epochs)
    rng = np.random.default_rng(config.seed)
    targets = {}
    for name, responses in unit_responses(model, _inputs(proxy), proxy.num_sub_tasks).items():
        layer = model.layers[name]
        core = layer.modules if config.core_modules is None else config.core_modules
        core = min(core, layer.modules)
        order = order_units(
            responses, modules=layer.modules, core=core, rng=rng, grouping=config.grouping
        )
        model.regroup(name, order)
        if core == layer.modules:
            model.selector.prefer_in_order(name, by=config.order_decay)
            continue
        # A module's load on a sub-task: what its units contribute there, beyond what all do.
        load = responses[:, order.numpy()].reshape(len(responses), layer.modules, -1).sum(axis=2)
        load = load / np.maximum(load.mean(axis=0, keepdims=True), 1e-12)
        report.assignment[name] = _assign(load, core, config)
        targets[name] = torch.from_numpy(
            gate_targets(
                load,
                report.assignment[name],
                core=core,
                core_share=config.core_share,
                smoothing=config.smoothing,
            )
        )
    held_out = None
    if model.sub_tasks and config.delta_share * config.enhancing_epochs > 0:
        if proxy.num_sub_tasks > model.sub_tasks:
            raise PrototypingError(
                f"Expected proxy data of at most the {model.sub_tasks} sub-tasks the model was "
                f"modularised with, got {proxy.num_sub_tasks}."
            )
        targets[DELTAS] = torch.eye(model.sub_tasks)
        model.add_deltas()
        proxy, held_out = proxy.split(config.held_out)
    if targets:
        run(
            "selector",
            train_selector(model, proxy, targets, config, generator),
            config.selector_epochs,
        )
    gates = mean_gates(model.selector, proxy)
    if model.deltas is not None:
        model.deltas.gates[: proxy.num_sub_tasks] = torch.from_numpy(gates[DELTAS])
    choose = by_importance(gates, model.costs)
    epochs = config.enhancing_epochs - (config.delta_epochs if held_out is not None else 0)
    run(
        "sub-models as deployed",
        train_as_deployed(model, proxy, choose, config, generator, epochs=epochs),
        epochs,
    )
    if held_out is not None:
        run(
            "delta modules",
            train_deltas(model, proxy, choose, config, generator),
            config.delta_epochs,
        )
        report.delta_scales = choose_scale(model, held_out, choose, config)


def _as_given(
    model: ModularModel,
    proxy: ProxyData,
    sub_models: SubModels,
    config: PrototypingConfig,
    generator: torch.Generator,
    run: Run,
) -> None:
    run("whole model", train_whole(model, proxy, config, generator), config.epochs)
    rng = np.random.default_rng(config.seed)
    for name, responses in unit_responses(model, _inputs(proxy), proxy.num_sub_tasks).items():
        modules = model.layers[name].modules  # all of them core: what contributes most comes first
        model.regroup(name, order_units(responses, modules=modules, core=modules, rng=rng))
    run(
        "sub-models as deployed",
        train_as_deployed(
            model,
            proxy,
            lambda sub_tasks, budget, rng: sub_models(model.costs, budget, rng),
            config,
            generator,
            epochs=config.enhancing_epochs,
        ),
        config.enhancing_epochs,
    )


def _assign(load: np.ndarray, core: int, config: PrototypingConfig) -> np.ndarray:
    sub_tasks, modules = load.shape
    per_sub_task = max(core, min(config.modules_per_sub_task, modules))
    per_module = config.sub_tasks_per_module
    if per_module is None:
        per_module = max(1, math.ceil(sub_tasks * (per_sub_task - core) / max(1, modules - core)))
    return assign(
        load, sub_tasks_per_module=per_module, modules_per_sub_task=per_sub_task, core=core
    )


def _inputs(proxy: ProxyData) -> Iterator[tuple[Tensor, Tensor]]:
    for x, _, tasks in proxy.in_order(256):
        yield x, tasks


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset[Any], *, batch_size: int = 256) -> float:
    """Share of samples whose largest logit is their label's, 0 to 1; nan without samples."""
    right = total = 0
    device = device_of(model)
    with evaluating(model):
        for x, y, *_ in DataLoader(data, batch_size=batch_size):
            right += int((model(x.to(device)).argmax(dim=1) == y.to(device)).sum())
            total += len(y)
    return right / total if total else math.nan
