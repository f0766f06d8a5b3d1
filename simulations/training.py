"""What every device does with what it gets, whatever the method: train it on local data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from simulations.settings import Settings


def adapt(
    model: nn.Module, data: TensorDataset, settings: Settings, generator: torch.Generator
) -> float:
    """Train a model on a device's data, in place; returns the mean loss of the last epoch.

    SGD with momentum 0.9, no weight decay, no augmentation; the same for every method.
    """
    x, y = data.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9)
    model.train()
    loss_sum = 0.0
    for _ in range(settings.local_epochs):
        loss_sum = 0.0
        for rows in torch.split(torch.randperm(len(x), generator=generator), settings.batch_size):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += float(loss.detach()) * len(rows)
    return loss_sum / len(x)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, as Flower's simulation does: sums then come out alike on every engine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
