"""Local adaptation that a device undoes where it doesn't help.

A device holds back some of its samples, adapts what it was sent on the others, and keeps it as it
was sent if it is no worse on those held back. The same for every method, and only for the final
adaptation: what a device trains for the cloud is merged with what others trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from eclm_flower.modular.modes import evaluating
from strategies.local_training import Training

HELD_BACK = 0.2

Adapt = Callable[[Any, TensorDataset, Training, torch.Generator], float]


def adapt_guarded(
    adapt: Adapt,
    model: nn.Module,
    data: TensorDataset,
    settings: Training,
    generator: torch.Generator,
) -> bool:
    """Adapt a model to local data, in place, if that helps.

    Parameters
    ----------
    adapt : callable
        Of a method: (model, data, settings, generator) -> loss.
    model : nn.Module
        What the method's `receive` returned.
    data : TensorDataset
        Of the device; with less than two samples of each class nothing can be held back, and the
        model is adapted as ever.
    settings : Training
    generator : torch.Generator

    Returns
    -------
    bool
        The model is adapted; else it is as it was.
    """
    rest, held_back = split(data)
    if not len(held_back):
        adapt(model, data, settings, generator)
        return True
    before = judged(model, held_back)
    state = copy.deepcopy(model.state_dict())
    adapt(model, rest, settings, generator)
    helped = judged(model, held_back) > before
    if not helped:
        model.load_state_dict(state)
    return helped


def split(data: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    """Hold back the last samples of each class: `HELD_BACK` of them, where there are two or more.

    The last and not any, for neighbours can be windows of one recording.
    """
    x, y = data.tensors
    rest, held_back = [], []
    for label in y.unique():  # type: ignore[no-untyped-call]
        rows = (y == label).nonzero().flatten()
        kept = len(rows) - (max(1, round(HELD_BACK * len(rows))) if len(rows) > 1 else 0)
        rest.append(rows[:kept])
        held_back.append(rows[kept:])
    first, last = (torch.cat(parts).sort().values for parts in (rest, held_back))
    return TensorDataset(x[first], y[first]), TensorDataset(x[last], y[last])


@torch.no_grad()
def judged(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Return how good a model is: by accuracy, and at the same accuracy by its loss."""
    x, y = data.tensors
    with evaluating(model):
        logits = model(x)
    return float((logits.argmax(dim=1) == y).float().mean()), -float(F.cross_entropy(logits, y))
