"""What ``eclm-flower inspect`` prints: how a model is cut, what that costs, what a budget buys."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torchvision
from rich.table import Table
from torch import Tensor, nn

from eclm_flower.adaptation import Budget, derive
from eclm_flower.errors import EclmError
from eclm_flower.modular import CostTable, ModularModel, Selection, modularize, slim_resnet
from eclm_flower.modular.costs import cost_table
from eclm_flower.modular.selection import count
from eclm_flower.prototyping.proxy import device_of


class InspectionError(EclmError, ValueError):
    """The command line names a model or a shape that can't be used."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to inspect.

    Attributes
    ----------
    model : str
        A classification model of torchvision, ``slim-resnet``, or ``module:factory``.
    modules : int
        Most modules a layer.
    classes : int, optional
        Classes of the head; the model's default if not given.
    shape : str, optional
        One input, such as ``3x224x224``.
    batch_size : int
        Batch of a training step.
    keep_whole : bool
        Keep blocks whole that have no exact split.
    budget : Budget, optional
        What a device can spend.
    """

    model: str
    modules: int
    classes: int | None
    shape: str | None
    batch_size: int
    keep_whole: bool
    budget: Budget | None


def inspect(request: Request) -> Iterator[str | Table]:
    """Cut the model and yield what there is to say of it.

    Raises
    ------
    EclmError
        The model is unknown or can't be cut, or the budget is too small.
    """
    body, example_input = _build(request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the selector's size, which is no matter here
        model = modularize(
            body,
            modules_per_layer=request.modules,
            example_input=example_input,
            keep_whole=request.keep_whole,
            batch_size=request.batch_size,
        )
    shape = "x".join(str(size) for size in example_input.shape[1:])
    try:
        costs = model.costs
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InspectionError(
            f"{request.model} does not take an input of {shape}: {error}"
        ) from error
    selection = None
    if request.budget is not None:
        equal = {name: np.full(number, 1 / number) for name, number in costs.modules.items()}
        selection = derive(equal, costs, request.budget)

    total = sum(parameter.numel() for parameter in body.parameters())
    yield (
        f"{request.model}: {total:,} parameters, one input is {shape}, "
        f"{len(model.layers)} module layers.\n"
    )
    yield _layer_table(model, selection)
    yield (
        "\nMB = 1,000,000 bytes. Training MFLOP: forward and backward for one sample. Training MB: "
        f"parameters, gradients, momentum and the activations of a batch of {request.batch_size}. "
        "The selector is not counted: a device gets it at most once.\n"
    )
    smallest = costs.of(dict.fromkeys(costs.modules, (0,)))
    rows = [(("whole model",), costs.whole), (("smallest sub-model",), smallest)]
    if selection is not None:
        rows.append((("this budget's sub-model",), costs.of(selection)))
    yield cost_table(("",), rows)
    if selection is not None and request.budget is not None:
        yield "\n" + _summary(costs, selection, request.budget)


def _build(request: Request) -> tuple[nn.Module, Tensor]:
    """Build the body, without memory for its parameters where that can be, and an example input."""
    options = {} if request.classes is None else {"num_classes": request.classes}
    if ":" in request.model:
        body = _from_factory(request.model)
        shape = _shape(request.shape or "3x224x224")
        return body, torch.zeros(1, *shape, device=device_of(body))
    if request.classes is not None and request.classes < 1:
        raise InspectionError(f"Expected --classes of 1 or more, got {request.classes}.")
    with torch.device("meta"):
        if request.model == "slim-resnet":
            shape = _shape(request.shape or "3x32x32")
            return slim_resnet(in_channels=shape[0], **options), torch.zeros(1, *shape)
        names = torchvision.models.list_models(module=torchvision.models)
        if request.model not in names:
            close = difflib.get_close_matches(request.model, [*names, "slim-resnet"], cutoff=0.5)
            remedy = f"did you mean {' or '.join(close)}?" if close else f"known are {names}."
            raise InspectionError(
                f"No model '{request.model}' in torchvision; {remedy} Your own: module:factory."
            )
        shape = _shape(request.shape or "3x224x224")
        build = torchvision.models.get_model_builder(request.model)
        try:
            body = build(weights=None, **options)
        except NotImplementedError:  # RegNet reckons with tensors, which have no values here
            with torch.device("cpu"):
                body = build(weights=None, **options).to("meta")
        if getattr(body, "image_size", shape[-1]) != shape[-1]:  # a transformer's is its own
            try:
                body = build(weights=None, image_size=shape[-1], **options)
            except AssertionError as error:
                raise InspectionError(f"{request.model} at {shape[-1]} pixels: {error}") from error
        return body, torch.zeros(1, *shape)


def _from_factory(name: str) -> nn.Module:
    """Call ``module:factory``; the module may lie in the current folder."""
    module, _, factory = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        body = cast(Callable[[], object], getattr(importlib.import_module(module), factory))()
    except (ImportError, AttributeError, ValueError) as error:
        raise InspectionError(f"No model from '{name}': {error}.") from error
    if not isinstance(body, nn.Module):
        raise InspectionError(f"Expected an nn.Module from '{name}', got {type(body).__name__}.")
    return body


def _shape(text: str) -> list[int]:
    try:
        shape = [int(size) for size in text.split("x")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise InspectionError(f"Expected a shape such as 3x224x224 for one input, got '{text}'.")
    return shape


def _layer_table(model: ModularModel, selection: Selection | None) -> Table:
    costs = model.costs
    rows = []
    for name, layer in model.layers.items():
        bought = () if selection is None else (str(len(selection[name])),)
        cells = (name, str(layer.modules), *bought, str(layer.units_per_module))
        rows.append((cells, costs.per_module[name]))
    bought = () if selection is None else ("bought",)
    columns = ("one module of", "modules", *bought, "units each")
    return cost_table(columns, [*rows, (("shared part", *[""] * (len(columns) - 1)), costs.shared)])


def _summary(costs: CostTable, selection: Selection, budget: Budget) -> str:
    held, total = count(selection), sum(costs.modules.values())
    limits = [
        f"{limit / scale:,.4g} {unit}"
        for limit, scale, unit in (
            (budget.communication_bytes, 1e6, "MB for one transfer of the sub-model, one way,"),
            (budget.computation_flops, 1e9, "GFLOP for a training step of one sample"),
            (budget.memory_bytes, 1e6, "MB of memory while training"),
        )
        if math.isfinite(limit)
    ]
    share = costs.of(selection).communication_bytes / costs.whole.communication_bytes
    return (
        f"A budget of {' and '.join(limits)} buys {held} of {total} modules ({held / total:.0%}), "
        f"{share:.0%} of the whole model's bytes. Here all modules matter alike; for a real "
        "device, its data says which matter."
    )
