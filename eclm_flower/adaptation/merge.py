"""Putting returned sub-models back into the cloud model, module by module (paper section 5.4).

``w_i <- sum over k in U_i of a_ik * w_ik``, with a_ik normalised over the set U_i of sub-models
that hold module i. Declared rules for what the paper leaves open:

- a module that nobody returned stays as it is, bit for bit;
- the shared part is the mean over all returned sub-models, weighted by their number of examples;
- a_ik = importance of module i to device k x its number of examples (the paper: importance alone,
  ``weighting="importance"``), so that with one module a layer the merge is FedAvg's;
- integer buffers and the selector are never merged: they stay the cloud's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from eclm_flower.adaptation.profile import Importance
from eclm_flower.errors import ReplyError
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.split import ModuleLayer

_MOST_EXAMPLES = 2**53  # larger counts aren't exact, and their sums overflow
Weighting = Literal["importance-examples", "importance", "examples"]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one device returns after adapting its sub-model.

    Attributes
    ----------
    device : int
        The device's number; a merge is done in its order, whatever the order of arrival.
    selection : dict[str, sequence of int]
        Modules held, ascending.
    state : dict[str, Tensor]
        Body key -> tensor; modular ones ``[..., m * h, ...]``.
    importance : dict[str, np.ndarray]
        Layer name -> ``[N]``.
    num_examples : float
        Training examples behind the update; > 0.
    """

    device: int
    selection: Selection
    state: Mapping[str, Tensor]
    importance: Importance
    num_examples: float


def merge(
    state: Mapping[str, Tensor],
    updates: Iterable[Update],
    layers: Iterable[ModuleLayer],
    *,
    weighting: Weighting = "importance-examples",
) -> dict[str, Tensor]:
    """Merge sub-models into a cloud model's body.

    Parameters
    ----------
    state : dict[str, Tensor]
        The body's state before; left as it is.
    updates : iterable of Update
        What came back, already checked (`check_update`).
    layers : iterable of ModuleLayer
        The cloud model's module layers.
    weighting : {"importance-examples", "importance", "examples"}
        What a_ik is proportional to.

    Returns
    -------
    dict[str, Tensor]
        The body's state after; tensors nobody touched are the same objects.
    """
    if weighting not in get_args(Weighting):
        raise ValueError(f"Expected weighting from {get_args(Weighting)}, got {weighting!r}.")
    ordered = sorted(updates, key=lambda update: update.device)
    merged = dict(state)
    if not ordered:
        return merged

    modular = {key for layer in layers for key in layer.axes}
    examples = np.array([update.num_examples for update in ordered])
    for key, tensor in state.items():
        if key not in modular and tensor.is_floating_point():
            total = torch.zeros_like(tensor)
            for update, weight in zip(ordered, examples / examples.sum(), strict=True):
                total.add_(update.state[key], alpha=float(weight))
            merged[key] = total

    for layer in layers:
        weights = _module_weights(layer, ordered, weighting)
        held = np.flatnonzero(weights.sum(axis=0)).tolist()
        for key in layer.axes:
            if not state[key].is_floating_point():
                continue
            total = torch.zeros_like(state[key])
            packed = layer.packed(key, total)
            for update, weight in zip(ordered, weights, strict=True):
                modules = list(update.selection[layer.name])
                share = torch.as_tensor(weight[modules], dtype=total.dtype)
                returned = layer.packed(key, update.state[key])
                packed[modules] += returned * share.view(-1, *[1] * (returned.ndim - 1))
            result = state[key].clone()
            layer.packed(key, result)[held] = packed[held]
            merged[key] = result
    return merged


def _module_weights(layer: ModuleLayer, updates: list[Update], weighting: Weighting) -> np.ndarray:
    """Compute a_ik, ``[updates, N]``: columns of modules that somebody holds sum to 1."""
    weights = np.zeros((len(updates), layer.modules))
    for row, update in zip(weights, updates, strict=True):
        modules = list(update.selection[layer.name])
        importance = 1.0 if weighting == "examples" else update.importance[layer.name][modules]
        examples = 1.0 if weighting == "importance" else update.num_examples
        # A module of no importance to any of its holders still counts: their plain mean.
        row[modules] = np.maximum(importance * examples, np.finfo(float).tiny)
    total = weights.sum(axis=0)
    return weights / np.where(total > 0, total, 1)


def check_update(
    update: Update, state: Mapping[str, Tensor], layers: Iterable[ModuleLayer]
) -> None:
    """Refuse an update that can't be merged, before it touches anything.

    Raises
    ------
    ReplyError
        Missing or surplus keys, wrong shape or dtype, NaN or infinity, or an impossible number of
        examples.
    """
    if not 0 < update.num_examples <= _MOST_EXAMPLES:  # false for nan, too
        raise ReplyError(
            f"Expected a number of examples above 0 and up to 2**53, got {update.num_examples}."
        )
    expected = {
        key: list(tensor.shape) for key, tensor in state.items() if tensor.is_floating_point()
    }
    for layer in layers:
        for key, axis in layer.axes.items():
            if key in expected:
                units = len(update.selection[layer.name]) * layer.units_per_module
                expected[key][axis] = units
    missing, surplus = expected.keys() - update.state.keys(), update.state.keys() - expected.keys()
    if missing or surplus:
        raise ReplyError(
            f"Expected the arrays that were sent; missing {sorted(missing)[:3]}, "
            f"surplus {sorted(surplus)[:3]}."
        )
    for key, shape in expected.items():
        tensor = update.state[key]
        if list(tensor.shape) != shape or tensor.dtype != state[key].dtype:
            raise ReplyError(
                f"Expected '{key}' of shape {shape} and {state[key].dtype}, "
                f"got {list(tensor.shape)} and {tensor.dtype}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ReplyError(f"Expected finite values in '{key}', got NaN or infinity.")
