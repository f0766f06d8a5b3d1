"""Where models compute: on the CPU, or on a GPU that all simulated devices share.

Data, random numbers and all that travels stay on the CPU. A device's model and samples move when
the model is opened, and the model comes back before it is returned: both ways draw the same batches
and send the same bytes, and what a GPU computes differs by rounding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.data import TensorDataset

from simulations.environment import DeviceData
from simulations.settings import SettingsError


def expect_compute(name: str) -> None:
    """Refuse a GPU that isn't there.

    Raises
    ------
    SettingsError
        There is none.
    """
    if name != "cpu" and not torch.cuda.is_available():
        raise SettingsError(f"Expected --compute cpu, for PyTorch finds no GPU here, got '{name}'.")


def placed(data: DeviceData, compute: str) -> DeviceData:
    """Return a device's samples where models compute."""
    return replace(data, train=moved(data.train, compute), test=moved(data.test, compute))


def moved(data: TensorDataset, compute: str) -> TensorDataset:
    """Return samples where models compute; the same ones if they are there."""
    if all(tensor.device.type == compute for tensor in data.tensors):
        return data
    return TensorDataset(*(tensor.to(compute) for tensor in data.tensors))
