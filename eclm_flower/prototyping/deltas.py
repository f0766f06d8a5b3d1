"""Delta modules: a small difference for each sub-task, on what all devices share (not in paper).

Where environments differ, the best weights differ too, but modules of one's own take the place of
modules shared with all. A delta module takes nothing away: for each sub-task s there is a
difference D_s on the shared part and on the core modules (the first of each layer). A device whose
data comes from the sub-tasks s in proportions w_s gets

    W + scale * sum_s (w_s - mean(w)) D_s

merged in the cloud before it is sent: a plain sub-model of the same bytes and FLOPs. The cloud
stores the core S times more. A device of which nothing is known (all w_s alike) gets W, as everyone
does with a scale of 0; and W is trained as if there were no differences. So there is nothing to
lose. The mean is taken off so that the differences hold what sub-tasks do not have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eclm_flower.errors import PrototypingError
from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.selection import Selection, checked, numbers

Mixture = Tensor | Sequence[float]
"""Proportions ``[S]`` in which a device's data comes from the sub-tasks; they sum to 1."""

_SCALE = "scale"
_DELTA = "delta."


class DeltaModules:
    """The differences of all sub-tasks; zero at the start.

    Train them with `stages.train_as_deployed`, then let `choose_scale` say how far to trust them.

    Parameters
    ----------
    model : ModularModel
        The cloud model W, of gating "uniform".
    sub_tasks : int
        Number of sub-tasks S.
    core_share : float (default: 0.25)
        Share of each layer's modules, the first ones, that have differences; at least one a layer.
        Larger sub-models hold the others as all devices do.

    Attributes
    ----------
    core : dict[str, int]
        Layer name -> number of core modules c.
    tensors : dict[str, Tensor]
        Body parameter -> differences ``[S, ...]``: of its own shape behind S where it is shared,
        narrowed to the core modules where it is modular.
    scale : float
        How much of the differences is merged into sub-models.

    Raises
    ------
    PrototypingError
        A parameter is out of range, or the model's gates weigh its modules.
    """

    def __init__(self, model: ModularModel, sub_tasks: int, *, core_share: float = 0.25) -> None:
        if sub_tasks < 1:
            raise PrototypingError(f"Expected at least 1 sub-task for deltas, got {sub_tasks}.")
        if not 0 < core_share <= 1:
            raise PrototypingError(f"Expected core_share above 0, at most 1, got {core_share}.")
        if model.gating != "uniform":
            raise PrototypingError(
                f"Expected a model of gating 'uniform' for deltas, got {model.gating!r}; choose it "
                "in modularize(..., gating='uniform')."
            )
        self.sub_tasks = sub_tasks
        self.scale = 1.0
        layers = model.layers.values()
        self.core = {layer.name: max(1, round(core_share * layer.modules)) for layer in layers}
        self._numbers = numbers(layers)
        self._layers = {key: layer for layer in layers for key in layer.axes}
        self.tensors: dict[str, Tensor] = {}
        for key, parameter in model.body.named_parameters():
            shape = list(parameter.shape)
            if (layer := self._layers.get(key)) is not None:
                shape = layer.narrowed_shape(key, shape, self.core[layer.name])
            self.tensors[key] = parameter.new_zeros((sub_tasks, *shape)).requires_grad_()

    @property
    def num_bytes(self) -> int:
        """Bytes that the cloud stores more."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def merged(
        self, state: Mapping[str, Tensor], selection: Selection, mixture: Mixture
    ) -> dict[str, Tensor]:
        """Merge the differences of a device's sub-tasks into a sub-model's tensors.

        Gradients flow back to `state` and to the differences.

        Parameters
        ----------
        state : dict[str, Tensor]
            The sub-model's parameters, keyed as in the body, as `ModularModel.narrowed_state`
            returns them; further tensors are passed on.
        selection : dict[str, sequence of int]
            Layer name -> its modules.
        mixture : Tensor or sequence of float
            ``[S]``.

        Returns
        -------
        dict[str, Tensor]
            Same keys, same shapes.

        Raises
        ------
        PrototypingError
            The mixture is not of S sub-tasks.
        """
        weights = torch.as_tensor(mixture, dtype=torch.float32)
        if weights.shape != (self.sub_tasks,):
            raise PrototypingError(
                f"Expected a mixture of {self.sub_tasks} sub-tasks, got {list(weights.shape)}."
            )
        weights = self.scale * (weights - weights.mean())
        chosen = checked(selection, self._numbers)
        result = dict(state)
        for key, differences in self.tensors.items():
            tensor = state[key]
            difference = torch.tensordot(weights.to(differences), differences, dims=1)
            if (layer := self._layers.get(key)) is not None:
                held = [module for module in chosen[layer.name] if module < self.core[layer.name]]
                whole = torch.zeros_like(tensor)
                layer.packed(key, whole)[: len(held)] = layer.packed(key, difference)[held]
                difference = whole
            result[key] = tensor + difference
        return result

    @torch.no_grad()
    def sub_model(self, model: ModularModel, selection: Selection, mixture: Mixture) -> nn.Module:
        """Build the sub-model that a device is sent, with tensors of its own.

        Parameters
        ----------
        model : ModularModel
            The cloud model W.
        selection : dict[str, sequence of int]
            Layer name -> module numbers.
        mixture : Tensor or sequence of float
            ``[S]``.
        """
        selection = checked(selection, self._numbers)
        merged = self.merged(model.narrowed_state(selection), selection, mixture)
        result = model.sub_model(selection)
        for key, parameter in result.named_parameters():
            parameter.copy_(merged[key])
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Return differences and scale, to save with safetensors."""
        state = {f"{_DELTA}{key}": tensor.detach() for key, tensor in self.tensors.items()}
        return {**state, _SCALE: torch.tensor(self.scale)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises
        ------
        PrototypingError
            The differences are of another model, number of sub-tasks or core.
        """
        own = self.state_dict()
        shapes, expected = ({key: list(t.shape) for key, t in s.items()} for s in (state, own))
        if shapes != expected:
            wrong = sorted(
                key
                for key in shapes.keys() | expected.keys()
                if shapes.get(key) != expected.get(key)
            )
            raise PrototypingError(
                f"Expected deltas of {self.sub_tasks} sub-tasks and cores of {self.core} for this "
                f"model; these tensors are missing, unknown or of another shape: {wrong[:5]}."
            )
        for key, tensor in self.tensors.items():
            tensor.copy_(state[f"{_DELTA}{key}"])
        self.scale = float(state[_SCALE])


def equal_mixture(sub_tasks: Sequence[int], number: int) -> Tensor:
    """Mix some of a number S of sub-tasks in equal proportions: float32 ``[S]``."""
    mixture = torch.zeros(number)
    mixture[list(sub_tasks)] = 1 / len(sub_tasks)
    return mixture
