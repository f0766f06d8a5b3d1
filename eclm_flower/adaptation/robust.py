"""Merging that survives a minority of devices that lie plausibly, module by module.

A liar within the limits of `outliers` (a flipped sign, a change some times too large) looks like
any other device. Two things hold it in check, for the shared part and for every module among the
devices that hold it:

- **clipping**: the change of a module is cut down to a usual size. It bounds what one device can do
  in a round, but not the direction;
- **voting**: value by value, the extremes are left out. It takes three to outvote one: a module
  that fewer devices return stays as it is. Clipped or not, a lone liar would win it in the end.

Where devices hold different data, what is extreme is also what is rare: voting and clipping slow
down learning. So neither is the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from eclm_flower.adaptation.update import Update, sent
from eclm_flower.modular.split import ModuleLayer, layer_by_key

Rule = Literal["mean", "trimmed-mean", "median"]
LEAST_VOTERS = 3
"""Devices that must return a module, or there is no vote on it."""


@dataclass(frozen=True, kw_only=True)
class Robust:
    """How to merge when some devices may lie.

    Attributes
    ----------
    rule : {"mean", "trimmed-mean", "median"}
        How the values of a module's holders are combined after clipping. "mean": weighted as
        usual. The other two are votes, of at least `LEAST_VOTERS`, in which all holders count
        alike, because importance and examples are a device's own claims.
    clip : float, optional (default: 1.5)
        Largest change of a module, or of the shared part, as a multiple of that of the round's
        median device: the root mean square over the values of the same layer, or of the shared
        part. None: no clipping.
    trim : float (default: 0.2)
        For "trimmed-mean": the share of the holders left out at each end, rounded up; one or two
        are always kept. It should not be less than the share of devices that may lie.
    """

    rule: Rule = "trimmed-mean"
    clip: float | None = 1.5
    trim: float = 0.2

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"Expected a rule from {get_args(Rule)}, got {self.rule!r}.")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"Expected clip above 0 and finite, or None, got {self.clip}.")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"Expected trim from 0 to less than 0.5, got {self.trim}.")

    def vote(self, values: Tensor) -> Tensor:
        """Combine the values of k devices, ``[k, ...]``, to ``[...]``.

        The median of an even number is the mean of the middle two.
        """
        k = len(values)
        most = (k - 1) // 2
        left_out = most if self.rule == "median" else min(math.ceil(self.trim * k), most)
        return values.sort(dim=0).values[left_out : k - left_out].mean(dim=0)


def clipped(
    updates: Sequence[Update],
    state: Mapping[str, Tensor],
    layers: Iterable[ModuleLayer],
    clip: float,
) -> list[Update]:
    """Scale down changes of modules, and of the shared part, that are large for the round.

    Parameters
    ----------
    updates : sequence of Update
        What came back.
    state : dict[str, Tensor]
        The cloud model's body they started from.
    layers : iterable of ModuleLayer
        Its module layers.
    clip : float
        See `Robust`.

    Returns
    -------
    list of Update
        In the same order; what is within bounds is the same tensors.
    """
    layers = list(layers)
    before = [dict(sent(update.selection, state, layers)) for update in updates]
    after = [dict(update.state) for update in updates]
    for part in _parts(state, layers):
        norms = [_norms(part, *pair) for pair in zip(before, after, strict=True)]
        # All modules of a layer are of one size, so this is the norm over what a device holds.
        limit = clip * float(np.median([float(n.square().mean().sqrt()) for n in norms]))
        if limit == 0:  # most devices return what they were sent
            continue
        for old, new, norm in zip(before, after, norms, strict=True):
            large = norm > limit
            if not large.any():
                continue
            scale = limit / norm[large]
            for key in part.keys:
                new[key] = new[key].clone()
                start, end = part.pieces(key, old[key])[large], part.pieces(key, new[key])
                by = scale.view(-1, *[1] * (end.ndim - 1))
                change = (end[large].double() - start.double()) * by
                end[large] = (start.double() + change).to(start.dtype)
    return [replace(update, state=new) for update, new in zip(updates, after, strict=True)]


def by_vote(
    state: Mapping[str, Tensor],
    updates: Sequence[Update],
    layers: Iterable[ModuleLayer],
    vote: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Combine the values of every module, and of the shared part, over the devices that hold it.

    Parameters
    ----------
    state : dict[str, Tensor]
        The body's state before; left as it is.
    updates : sequence of Update
        What came back, in the order of devices.
    layers : iterable of ModuleLayer
        The cloud model's module layers.
    vote : callable
        ``[k, ...]``, the values of k devices, to ``[...]``.

    Returns
    -------
    dict[str, Tensor]
        The body's state after; modules with fewer than `LEAST_VOTERS` holders are as before.
    """
    merged = dict(state)
    for part in _parts(state, list(layers)):
        holders: dict[int, list[tuple[Update, int]]] = {}
        for update in updates:
            for position, number in enumerate(part.held(update)):
                holders.setdefault(number, []).append((update, position))
        for key in part.keys:
            merged[key] = state[key].clone()
            target = part.pieces(key, merged[key])
            for number, held in holders.items():
                if len(held) < LEAST_VOTERS:
                    continue
                values = [part.pieces(key, update.state[key])[at] for update, at in held]
                target[number] = vote(torch.stack(values))
    return merged


@dataclass(frozen=True)
class _Part:
    """A module layer, or the shared part as if it were a layer of one module."""

    keys: list[str]
    pieces: Callable[[str, Tensor], Tensor]  # a view of a key's tensor, ``[m, ...]``
    held: Callable[[Update], Sequence[int]]  # the numbers of an update's m pieces


def _parts(state: Mapping[str, Tensor], layers: Sequence[ModuleLayer]) -> Iterator[_Part]:
    floating = [key for key, tensor in state.items() if tensor.is_floating_point()]
    modular = layer_by_key(layers).keys()
    shared = [key for key in floating if key not in modular]
    if shared:
        yield _Part(shared, lambda _, tensor: tensor[None], lambda _: (0,))
    for layer in layers:
        keys = [key for key in floating if key in layer.axes]
        yield _Part(keys, layer.packed, lambda update, name=layer.name: update.selection[name])  # type: ignore[misc]


def _norms(part: _Part, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
    """Root mean square change of every piece, over all of its tensors: float64 ``[m]``."""
    squares: list[Tensor] = []
    values = 0
    for key in part.keys:
        change = part.pieces(key, new[key]).double() - part.pieces(key, old[key]).double()
        squares.append(change.reshape(len(change), -1).square().sum(dim=1))
        values += change[0].numel()
    return (torch.stack(squares).sum(dim=0) / values).sqrt()
