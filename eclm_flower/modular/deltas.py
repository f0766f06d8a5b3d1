"""Delta modules: a small difference for each sub-task, on what all devices share (not in paper).

Where environments differ, the best weights differ too, but modules of one's own take the place of
modules shared with all. A delta module takes nothing away: for each sub-task s there is a
difference D_s on the shared part and on the core modules (the first of each layer). A device whose
data comes from the sub-tasks s in proportions w_s gets

    W + sum_s v_s D_s,   v_s = max(0, w_s - 1 / S) * S / (S - 1)

merged in the cloud before it is sent: a plain sub-model of the same bytes and FLOPs. The cloud
stores the core S times more. A device of one sub-task gets W + D_s, and one of which nothing is
known (all w_s alike) gets W.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from eclm_flower.errors import ModularizationError
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.split import ModuleLayer, layer_by_key

Mixture = Tensor | Sequence[float]
"""Proportions ``[S]`` in which a device's data comes from the sub-tasks; they sum to 1."""

_ROUNDING = 1e-6  # of a proportion


class DeltaModules(nn.Module):
    """The differences of all sub-tasks; zero at the start, which is to have none.

    Part of a `ModularModel` in the cloud; devices never have them. `prototype` trains them.

    Parameters
    ----------
    body : nn.Module
        The body W of the cloud model.
    layers : iterable of ModuleLayer
        Its module layers.
    sub_tasks : int
        Number of sub-tasks S.
    core_share : float (default: 0.25)
        Share of each layer's modules, the first ones, that have differences; at least one a layer.
        Larger sub-models hold the others as all devices do.

    Attributes
    ----------
    core : dict[str, int]
        Layer name -> number of core modules c.
    gates : Tensor
        float64 ``[S, S]``: the selector's mean gates of the delta modules on each sub-task, by
        which a device's mixture is told from its importance.

    Raises
    ------
    ModularizationError
        A parameter is out of range.
    """

    gates: Tensor

    def __init__(
        self,
        body: nn.Module,
        layers: Iterable[ModuleLayer],
        sub_tasks: int,
        *,
        core_share: float = 0.25,
    ) -> None:
        super().__init__()
        if sub_tasks < 1:
            raise ModularizationError(f"Expected at least 1 sub-task for deltas, got {sub_tasks}.")
        if not 0 < core_share <= 1:
            raise ModularizationError(f"Expected core_share above 0, at most 1, got {core_share}.")
        self.sub_tasks = sub_tasks
        layers = list(layers)
        self.core = {layer.name: max(1, round(core_share * layer.modules)) for layer in layers}
        self._layers = layer_by_key(layers)
        self._names: dict[str, str] = {}
        for key, parameter in body.named_parameters():
            shape = list(parameter.shape)
            if (layer := self._layers.get(key)) is not None:
                shape = layer.narrowed_shape(key, shape, self.core[layer.name])
            self._names[key] = key.replace(".", "/")  # names of parameters may hold no dots
            zeros = parameter.detach().new_zeros((sub_tasks, *shape))
            self.register_parameter(self._names[key], nn.Parameter(zeros))
        self.register_buffer("gates", torch.eye(sub_tasks, dtype=torch.float64))

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """Body parameter -> differences ``[S, ...]``.

        Of the parameter's own shape behind S where it is shared, narrowed to the core modules where
        it is modular.
        """
        return {key: self.get_parameter(name) for key, name in self._names.items()}

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Key differences by their names in the state dict, not by the body's."""
        return {self._names[key]: tensor for key, tensor in tensors.items()}

    def weights(self, mixture: Mixture) -> Tensor:
        """Return v of a mixture w: float64 ``[S]``, how much of each difference a device is sent.

        Raises
        ------
        ValueError
            The mixture is not of S sub-tasks.
        """
        weights = torch.as_tensor(mixture, dtype=torch.float64)
        number = self.sub_tasks
        if weights.shape != (number,):
            raise ValueError(
                f"Expected a mixture of {number} sub-tasks, got {list(weights.shape)}."
            )
        if number == 1:
            return weights
        above = weights - 1 / number
        above[above < _ROUNDING] = 0  # 1 / S in single precision can be more than 1 / S
        return above * (number / (number - 1))

    def difference(self, selection: Selection, mixture: Mixture) -> dict[str, Tensor]:
        """Add up what a device's sub-model differs by from W; gradients flow back to it.

        Parameters
        ----------
        selection : dict[str, sequence of int]
            Layer name -> its modules, ascending.
        mixture : Tensor or sequence of float
            ``[S]``.

        Returns
        -------
        dict[str, Tensor]
            Body parameter -> difference, of the shape it has in the sub-model.

        Raises
        ------
        ValueError
            The mixture is not of S sub-tasks.
        """
        weights = self.weights(mixture)
        rows = weights.nonzero()[:, 0]  # a device has few of many sub-tasks
        device = next(self.parameters()).device
        weights, rows = weights[rows].to(device), rows.to(device)
        result = {}
        for key, differences in self.tensors.items():
            own = differences.flatten(1).index_select(0, rows)
            difference = (weights.to(own.dtype) @ own).view(differences.shape[1:])
            if (layer := self._layers.get(key)) is not None:
                difference = layer.widened(key, difference, selection[layer.name])
            result[key] = difference
        return result

    def merged(
        self, state: Mapping[str, Tensor], selection: Selection, mixture: Mixture
    ) -> dict[str, Tensor]:
        """Merge the differences of a device's sub-tasks into a sub-model's tensors.

        Parameters
        ----------
        state : dict[str, Tensor]
            Tensors of the sub-model, keyed as in the body (`ModularModel.narrowed_state`); what has
            no difference is passed on.
        selection, mixture
            See `difference`.
        """
        result = dict(state)
        for key, difference in self.difference(selection, mixture).items():
            result[key] = result[key] + difference
        return result


def equal_mixture(sub_tasks: Sequence[int], number: int) -> Tensor:
    """Mix some of a number S of sub-tasks in equal proportions: float32 ``[S]``."""
    mixture = torch.zeros(number)
    mixture[list(sub_tasks)] = 1 / len(sub_tasks)
    return mixture
