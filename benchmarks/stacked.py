"""Models of many devices trained at once, as `strategies.local_training.train` trains each.

A real device trains its own model alone; a machine that simulates many spends much of its time on
small models between the operations, and does each for all of them at once here: parameters gain an
axis [device, ...] (`torch.func`), and a step is one batched operation a layer. Convolutions become
grouped ones, which a GPU may be fast at; on a CPU, where the convolutions of one device fill a core
by themselves, they are slower than one device after the other (`benchmarks.stacked_training`).

What is computed is the same: every device draws the batches it would draw alone. Sums are taken in
another order, so results differ by float32 rounding.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import TensorDataset

from eclm_flower.modular import ModularModel
from strategies.local_training import Training

_MOMENTUM = 0.9  # as in `strategies.local_training.train`


class StackingError(ValueError):
    """Models can't be trained together: one after the other, they can."""


def train_stacked(
    models: Sequence[nn.Module],
    data: Sequence[TensorDataset],
    settings: Training,
    generators: Sequence[torch.Generator],
    *,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Train models of equal shapes at once, in place, each on its own data.

    Parameters
    ----------
    models : sequence of nn.Module
        One a device; map inputs ``[B, ...]`` to logits ``[B, C]``, no sample by another.
    data : sequence of TensorDataset
        ``(x [n, ...], y [n])`` of each; n may differ.
    settings : Training
        Learning rate, batch size, epochs.
    generators : sequence of torch.Generator
        Of the order of samples, one a device.
    device : torch.device
        Where to compute. Models and data stay where they are.

    Returns
    -------
    list of float
        The mean loss of each in its last epoch.

    Raises
    ------
    StackingError
        Shapes differ, or a model is of a kind for which this is not what training alone does; see
        `stackable`.
    """
    if len({_structure(model) for model in models}) > 1:
        raise StackingError("Expected models that differ in nothing but the values of tensors.")
    for model in models:
        model.train()
        if not stackable(model):
            raise StackingError(
                "Expected a plain model without dropout, its batch norm frozen: others draw random "
                "numbers, mix the samples of a batch, or hold more than their tensors say."
            )
    plan = Plan.drawn([len(of_device) for of_device in data], settings, generators)
    x, y = (
        torch.cat([data[number].tensors[i] for number in plan.order]).to(device) for i in (0, 1)
    )
    weights = plan.weights.to(device)
    rows = plan.rows.to(device)

    model = models[0]
    parameters, buffers = stack_module_state([models[number] for number in plan.order])
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    stacked = {
        name: tensor.detach().to(device) for name, tensor in {**parameters, **buffers}.items()
    }
    learnt = {name: tensor for name, tensor in stacked.items() if name in learns}
    fixed = {name: tensor for name, tensor in stacked.items() if name not in learns}
    momentum = {name: torch.zeros_like(tensor) for name, tensor in learnt.items()}

    def loss_of_batch(
        learnt: dict[str, Tensor], fixed: dict[str, Tensor], x: Tensor, y: Tensor, weights: Tensor
    ) -> Tensor:
        logits = functional_call(model, {**learnt, **fixed}, (x,))
        return (F.cross_entropy(logits, y, reduction="none") * weights).sum()

    of_every_device = vmap(grad_and_value(loss_of_batch))
    losses = torch.zeros(len(rows), len(models), device=device)
    for step, training in enumerate(plan.training):
        batch = rows[step, :training]
        gradients, losses[step, :training] = of_every_device(
            {name: tensor[:training] for name, tensor in learnt.items()},
            {name: tensor[:training] for name, tensor in fixed.items()},
            x[batch],
            y[batch],
            weights[step, :training],
        )
        for name, gradient in gradients.items():
            velocity = momentum[name][:training].mul_(_MOMENTUM).add_(gradient)
            learnt[name][:training].sub_(velocity, alpha=settings.learning_rate)

    with torch.no_grad():
        for place, number in enumerate(plan.order):
            for name, parameter in models[number].named_parameters():
                if name in learnt:
                    parameter.copy_(learnt[name][place])
    return plan.losses_of_last_epoch(losses.cpu())


def stackable(model: nn.Module) -> bool:
    """Whether `train_stacked` does to a model, in the mode it is in, what training alone does.

    Not if the samples of a batch meet (batch norm that trains), if numbers are drawn (dropout), or
    if a forward pass depends on more than tensors (the gates of a `ModularModel`).
    """
    return not any(
        isinstance(layer, ModularModel)
        or (isinstance(layer, _NormBase) and layer.training)
        or (isinstance(layer, _DropoutNd) and layer.training and layer.p > 0)
        for layer in model.modules()
    )


def _structure(model: nn.Module) -> Hashable:
    """Everything about a model that has to be equal, but not the values of its tensors."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    return (
        tuple((name, type(layer)) for name, layer in model.named_modules()),
        tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors),
    )


@dataclass(frozen=True)
class Plan:
    """Which samples every device trains on in every step.

    Attributes
    ----------
    order : list[int]
        Devices by their number of steps, most first: those still training are always in front.
        An axis ``k`` follows it, and so do the samples, device after device.
    training : list[int]
        Step -> devices that have a batch in it.
    rows : Tensor
        int64 ``[steps, k, B]``: samples of each batch; short batches are filled with any.
    local_rows : Tensor
        The same, counted from each device's own first sample.
    weights : Tensor
        float32 ``[steps, k, B]``: 1 / size of the batch for its samples, 0 for what fills it.
    sizes : Tensor
        int64 ``[steps, k]``: samples of each batch.
    last_epoch : Tensor
        Boolean ``[steps, k]``: the batch belongs to its device's last epoch.
    """

    order: list[int]
    training: list[int]
    rows: Tensor
    local_rows: Tensor
    weights: Tensor
    sizes: Tensor
    last_epoch: Tensor

    @classmethod
    def drawn(
        cls, samples: Sequence[int], settings: Training, generators: Sequence[torch.Generator]
    ) -> Self:
        """Draw the batches that `strategies.local_training.train` would draw for each device."""
        batches = [
            [
                torch.split(torch.randperm(n, generator=generator), settings.batch_size)
                for _ in range(settings.local_epochs)
            ]
            for n, generator in zip(samples, generators, strict=True)
        ]
        order = sorted(range(len(samples)), key=lambda number: -len(batches[number][0]))
        steps = settings.local_epochs * len(batches[order[0]][0])
        rows = torch.zeros(steps, len(order), settings.batch_size, dtype=torch.long)
        local_rows = torch.zeros_like(rows)
        sizes = torch.zeros(steps, len(order), dtype=torch.long)
        last_epoch = torch.zeros(steps, len(order), dtype=torch.bool)
        start = 0
        for place, number in enumerate(order):
            for step, batch in enumerate(chain.from_iterable(batches[number])):
                local_rows[step, place, : len(batch)] = batch
                sizes[step, place] = len(batch)
                last_epoch[step, place] = step >= len(batches[number][0]) * (
                    settings.local_epochs - 1
                )
            rows[:, place] = start + local_rows[:, place]
            start += samples[number]
        filled = torch.arange(settings.batch_size) < sizes[:, :, None]
        return cls(
            order=order,
            training=(sizes > 0).sum(dim=1).tolist(),
            rows=rows,
            local_rows=local_rows,
            weights=filled / sizes.clamp(min=1)[:, :, None],
            sizes=sizes,
            last_epoch=last_epoch,
        )

    def losses_of_last_epoch(self, losses: Tensor) -> list[float]:
        """Average over the last epoch: losses ``[steps, k]`` of batches -> one a device."""
        counted = self.sizes * self.last_epoch
        means = (losses * counted).sum(dim=0) / counted.sum(dim=0)
        return [float(means[self.order.index(number)]) for number in range(len(self.order))]
