"""What a device does with what it got, unless its method does otherwise: train it on local data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from eclm_flower.modular.batch_norm import batch_sizes

# Of methods in which a device trains on its own and never returns anything (paper section 6).
ON_DEVICE_EPOCHS = 10


class Training(Protocol):
    """How devices train; the same for every method of an experiment.

    Attributes
    ----------
    learning_rate : float
    batch_size : int
    local_epochs : int
    masked_loss : bool
        Train with `own_classes_only`.
    """

    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def local_epochs(self) -> int: ...  # noqa: D102
    @property
    def masked_loss(self) -> bool: ...  # noqa: D102


def train(
    model: nn.Module,
    data: TensorDataset,
    settings: Training,
    generator: torch.Generator,
    *,
    epochs: int | None = None,
    clip_norm: float | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> float:
    """Train a module on a device's data, in place, by SGD with momentum 0.9.

    Parameters
    ----------
    model : nn.Module
        Maps inputs ``[B, ...]`` to logits ``[B, C]``.
    data : TensorDataset
        ``(x [n, ...], y [n])``.
    settings : Training
        Learning rate, batch size, epochs.
    generator : torch.Generator
        Of the order of samples.
    epochs : int, optional
        Instead of the settings' ``local_epochs``.
    clip_norm : float, optional
        Clip gradients to this norm.
    loss : callable, optional
        (logits ``[B, C]``, labels ``[B]``) -> mean loss of a batch; by default what the settings
        say.

    Returns
    -------
    float
        The mean loss of the last epoch.
    """
    x, y = data.tensors
    if loss is None:
        loss = own_classes_only(y) if settings.masked_loss else F.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9)
    model.train()
    sizes = batch_sizes(len(x), settings.batch_size, model)
    losses: list[tuple[Tensor, int]] = []
    for _ in range(settings.local_epochs if epochs is None else epochs):
        losses = []
        for rows in torch.split(torch.randperm(len(x), generator=generator), sizes):
            batch_loss = loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            batch_loss.backward()  # type: ignore[no-untyped-call]
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            losses.append((batch_loss.detach(), len(rows)))
    # Read at the end: a GPU is not waited for in every step.
    return sum(float(batch_loss) * number for batch_loss, number in losses) / len(x)


def own_classes_only(y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a cross-entropy over the classes that occur in a device's labels ``[n]``.

    The logits of all others take no part in it and get no gradient, so what the cloud knows of them
    is not unlearned.
    """
    present = y.unique()  # type: ignore[no-untyped-call]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        absent[present] = False
        return F.cross_entropy(logits.masked_fill(absent, -torch.inf), labels)

    return loss


def train_alone(
    model: nn.Module, data: TensorDataset, settings: Training, generator: torch.Generator
) -> float:
    """Train as a device that gets no help from others: for `ON_DEVICE_EPOCHS`."""
    return train(model, data, settings, generator, epochs=ON_DEVICE_EPOCHS)
