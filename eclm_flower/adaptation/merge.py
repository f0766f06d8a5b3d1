"""Putting returned sub-models back into the cloud model, module by module (paper section 5.4).

``w_i <- sum over k in U_i of a_ik * w_ik``, with a_ik normalised over the set U_i of sub-models
that hold module i. Declared rules for what the paper leaves open:

- a module that nobody returned stays as it is, bit for bit;
- the shared part is the mean over all returned sub-models, weighted by their number of examples;
- a_ik = importance of module i to device k x its number of examples (the paper: importance alone,
  ``weighting="importance"``), so that with one module a layer the merge is FedAvg's;
- integer buffers and the selector are never merged: they stay the cloud's;
- where devices may lie, `Robust` bounds their changes and replaces the mean by a vote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from eclm_flower.adaptation.robust import Robust, by_vote, clipped
from eclm_flower.adaptation.update import Update
from eclm_flower.modular.split import ModuleLayer, layer_by_key

_SMALL = 2**15  # values for which calling PyTorch takes longer than computing
_EXACT = (torch.float32, torch.float64)  # a share in lower precision would be another

Weighting = Literal["importance-examples", "importance", "examples"]


class RunningMean:
    """The weighted mean of every module over the updates that hold it, one update at a time.

    It takes the memory of one cloud model, however many updates there are. The bits of the result
    depend on the order of the updates: add them in the order of devices.

    Parameters
    ----------
    state, layers, weighting
        See `merge`.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        layers: Iterable[ModuleLayer],
        weighting: Weighting = "importance-examples",
    ) -> None:
        if weighting not in get_args(Weighting):
            raise ValueError(f"Expected weighting from {get_args(Weighting)}, got {weighting!r}.")
        self.state = dict(state)
        self.layers = list(layers)
        self.weighting = weighting
        modular = layer_by_key(self.layers).keys()
        self._shared = [
            key for key, t in self.state.items() if t.is_floating_point() and key not in modular
        ]
        self._modular = {
            layer.name: [key for key in layer.axes if self.state[key].is_floating_point()]
            for layer in self.layers
        }
        self._packed: dict[str, Tensor] = {}  # of modules, once there is an update
        self._examples = 0.0  # behind the shared part so far
        self._weight = {layer.name: np.zeros(layer.modules) for layer in self.layers}

    def add(self, update: Update) -> None:
        """Take an update in."""
        if self._examples == 0:  # the first one: until now the tensors are the caller's own
            for key in (*self._shared, *(k for keys in self._modular.values() for k in keys)):
                self.state[key] = self.state[key].clone()  # in the same order of memory
            for layer in self.layers:
                for key in self._modular[layer.name]:
                    self._packed[key] = layer.packed(key, self.state[key])
        # A mean moves towards what comes by the share of its weight: all of the way at first, so
        # that a value alone is taken as it is, and not at all where all agree.
        self._examples += update.num_examples
        for key in self._shared:
            self.state[key].lerp_(update.state[key], update.num_examples / self._examples)
        for layer in self.layers:
            modules = list(update.selection[layer.name])
            weights = self._weights(layer, modules, update)
            so_far = self._weight[layer.name]
            so_far[modules] += weights
            shares = weights / so_far[modules]
            index, by = torch.tensor(modules), torch.from_numpy(shares)
            for key in self._modular[layer.name]:
                mean, came = self._packed[key], layer.packed(key, update.state[key])
                if came.numel() <= _SMALL and came.dtype in _EXACT:
                    moved = mean.index_select(0, index)
                    moved.lerp_(came, by.to(mean.dtype).view(-1, *[1] * (mean.ndim - 1)))
                    mean.index_copy_(0, index, moved)
                    continue
                pieces = mean.unbind()
                for module, piece, share in zip(modules, came.unbind(), shares, strict=True):
                    pieces[module].lerp_(piece, float(share))

    def _weights(self, layer: ModuleLayer, modules: list[int], update: Update) -> np.ndarray:
        """Compute what a_ik is proportional to, ``[m]``."""
        examples = 1.0 if self.weighting == "importance" else update.num_examples
        if self.weighting == "examples":
            return np.full(len(modules), examples)
        # A module of no importance to any of its holders still counts: their plain mean.
        importance = update.importance[layer.name][modules]
        return np.maximum(importance * examples, np.finfo(float).tiny)


def merge(
    state: Mapping[str, Tensor],
    updates: Iterable[Update],
    layers: Iterable[ModuleLayer],
    *,
    weighting: Weighting = "importance-examples",
    robust: Robust | None = None,
) -> dict[str, Tensor]:
    """Merge sub-models into a cloud model's body.

    Parameters
    ----------
    state : dict[str, Tensor]
        The body's state before; left as it is.
    updates : iterable of Update
        What came back, already checked (`check_update`). A collection is merged in the order of
        devices. An iterator is merged as it goes and never held as a whole, unless `robust` needs
        to; it has to come in an order that does not depend on chance.
    layers : iterable of ModuleLayer
        The cloud model's module layers.
    weighting : {"importance-examples", "importance", "examples"}
        What a_ik is proportional to.
    robust : Robust, optional
        How to merge when some devices may lie; None: the weighted mean.

    Returns
    -------
    dict[str, Tensor]
        The body's state after. Integer buffers are the same objects; other tensors may be copies
        even where nobody changed them.
    """
    layers = list(layers)
    if robust is not None or not isinstance(updates, Iterator):
        updates = sorted(updates, key=lambda update: update.device)
        if robust is not None and robust.clip is not None:
            updates = clipped(updates, state, layers, robust.clip)
        if robust is not None and robust.rule != "mean":
            return by_vote(state, updates, layers, robust.vote)
    mean = RunningMean(state, layers, weighting)
    for update in updates:
        mean.add(update)
        del update  # or it would stay in memory while the next one is read
    return mean.state
