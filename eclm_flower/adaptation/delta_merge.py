"""What of a device's change goes to its sub-tasks' delta modules (not in the paper).

A device of mixture w trained W with the differences of its sub-tasks; what it changed is c. The
mean of all changes goes to W, as without delta modules (`merge`). What the devices of a sub-task
changed beyond that goes to the sub-task's delta module:

    D_s <- D_s + step * k / (k + 1) * (mean over devices of c, weighted by w_s x examples, - mean c)

for every module of the core and for the shared part. A device's sub-tasks are those whose
differences it was sent: w_s > 1 / S. k is the number of devices behind it, the sum of their w_s:
what a single device changed is as much its own as its sub-task's, so only half of it is believed.
What no device of a sub-task held stays as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from eclm_flower.adaptation.update import Update
from eclm_flower.modular.deltas import DeltaModules, Mixture
from eclm_flower.modular.split import ModuleLayer, layer_by_key


class DeltaMean:
    """The mean change of the devices of each sub-task, one update at a time.

    It takes the memory of the delta modules. Like `merge`, its bits depend on the order of updates.

    Parameters
    ----------
    deltas : DeltaModules
        As they were sent.
    state : dict[str, Tensor]
        W, the cloud model's body, as it was sent.
    layers : iterable of ModuleLayer
        Its module layers.
    """

    def __init__(
        self, deltas: DeltaModules, state: Mapping[str, Tensor], layers: Iterable[ModuleLayer]
    ) -> None:
        self._deltas, self._state = deltas, state
        self._layers = layer_by_key(layers)
        self._total = {key: torch.zeros_like(t) for key, t in deltas.tensors.items()}
        # Examples and devices behind each piece ``[S, pieces]``: a module, or all that is shared.
        self._examples = {name: np.zeros((deltas.sub_tasks, c)) for name, c in self._pieces.items()}
        self._devices = {name: np.zeros((deltas.sub_tasks, c)) for name, c in self._pieces.items()}

    @property
    def _pieces(self) -> dict[str, int]:
        return {"": 1, **self._deltas.core}

    def observing(
        self, updates: Iterable[Update], mixtures: Mapping[int, Mixture]
    ) -> Iterator[Update]:
        """Pass updates on, taking in those of devices whose mixture is known."""
        for update in updates:
            if (mixture := mixtures.get(update.device)) is not None:
                self.add(update, mixture)
            yield update
            del update

    @torch.no_grad()
    def add(self, update: Update, mixture: Mixture) -> None:
        """Take an update in; its tensors are what the device changed W to, differences taken off.

        Parameters
        ----------
        update : Update
            Of a device.
        mixture : Tensor or sequence of float
            ``[S]``, its sub-tasks.
        """
        shares = torch.as_tensor(mixture, dtype=torch.float64)
        sub_tasks = self._deltas.weights(mixture).nonzero()[:, 0].tolist()
        held = {
            name: [module for module in update.selection[name] if module < core] if name else [0]
            for name, core in self._pieces.items()
        }
        for s in sub_tasks:
            for name, pieces in held.items():
                self._devices[name][s, pieces] += float(shares[s])
                self._examples[name][s, pieces] += float(shares[s]) * update.num_examples
        for key, total in self._total.items():
            name, pieces = self._name(key), held[self._name(key)]
            change = self._packed(key, update.state[key])[: len(pieces)]
            change = change - self._packed(key, self._state[key])[pieces]
            for s in sub_tasks:
                weight = float(shares[s]) * update.num_examples
                self._packed(key, total[s])[pieces] += weight * change

    @torch.no_grad()
    def stepped(self, merged: Mapping[str, Tensor], *, step: float) -> dict[str, Tensor]:
        """Return the differences after a round.

        Parameters
        ----------
        merged : dict[str, Tensor]
            W after the round.
        step : float
            How far to go; 1 is all of the way.

        Returns
        -------
        dict[str, Tensor]
            Keyed as in the state of `DeltaModules`.
        """
        result: dict[str, Tensor] = {}
        for key, before in self._deltas.tensors.items():
            name = self._name(key)
            examples, devices = self._examples[name], self._devices[name]
            result[key] = before.detach().clone()
            common = self._packed(key, merged[key]) - self._packed(key, self._state[key])
            for s, piece in zip(*np.nonzero(examples), strict=True):
                own = self._packed(key, self._total[key][s])[piece] / float(examples[s, piece])
                believed = step * devices[s, piece] / (devices[s, piece] + 1)
                self._packed(key, result[key][s])[piece] += believed * (own - common[piece])
        return self._deltas.named(result)

    def _name(self, key: str) -> str:
        return self._layers[key].name if key in self._layers else ""

    def _packed(self, key: str, tensor: Tensor) -> Tensor:
        """View a tensor ``[pieces, ...]``: modules, or all that is shared as one."""
        return self._layers[key].packed(key, tensor) if key in self._layers else tensor[None]
