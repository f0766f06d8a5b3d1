"""The cloud's proxy data in two parts, one to train on and one to decide on; and whose it is like.

What is decided before any device is asked (whether to specialise, and how far) may look neither at
test data nor at what was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from simulations.environment.rows import expect, in_order, join
from simulations.world import World

HELD_OUT = 0.25


@dataclass(frozen=True, kw_only=True)
class ProxyPart:
    """Some of the proxy data.

    Attributes
    ----------
    data : TensorDataset
        ``(x [n, ...], y [n])``.
    sub_tasks : Tensor
        int64 ``[n]``.
    """

    data: TensorDataset
    sub_tasks: Tensor

    def of(self, sub_tasks: tuple[int, ...]) -> Self:
        """Return the samples of some sub-tasks, which are numbered anew from 0."""
        own = torch.isin(self.sub_tasks, torch.tensor(sub_tasks))
        x, y = self.data.tensors
        numbers = torch.unique(self.sub_tasks[own], return_inverse=True)[1]
        return type(self)(data=TensorDataset(x[own], y[own]), sub_tasks=numbers)


def split_proxy(world: World) -> tuple[ProxyPart, ProxyPart]:
    """Split the proxy data into a part for training and a held-out one.

    The last rows of each (sub-task, class) are held out, with a gap before them, because neighbours
    can overlap in time; where there are too few, none.
    """
    data, sub_tasks = world.environment.proxy(), world.environment.proxy_sub_tasks
    x, y = data.tensors
    key = (sub_tasks * world.environment.num_classes + y).numpy()
    groups = [in_order(np.flatnonzero(key == k), 0, HELD_OUT) for k in np.unique(key)]
    parts = []
    for which in (1, 2):
        rows = torch.from_numpy(join([group[which] for group in groups]))
        part = ProxyPart(data=TensorDataset(x[rows], y[rows]), sub_tasks=sub_tasks[rows])
        parts.append(part)
    return parts[0], parts[1]


def sub_tasks_of_devices(world: World) -> list[tuple[int, ...]]:
    """Return the sub-tasks that each device's data is of at the start.

    Its view, where the cloud knows the views; its own person or speaker, if those are the
    sub-tasks; else its classes.
    """
    environment, devices = world.environment, range(world.settings.devices)
    if world.settings.feature_shift == "known":
        return [(environment.view_of(device) or 0,) for device in devices]
    if environment.sub_tasks_are_classes:
        labels = torch.unique(environment.proxy().tensors[1])
        held = [torch.tensor(world.data(device, 0).classes) for device in devices]
        return [tuple(torch.isin(labels, own).nonzero().flatten().tolist()) for own in held]
    number = int(environment.proxy_sub_tasks.max()) + 1
    expect(number == len(devices), "proxy data of every device", f"that of {number}")
    return [(device,) for device in devices]
