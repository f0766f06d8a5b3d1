"""Accuracy, and accuracy among the classes a device has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eclm_flower.modular.modes import evaluating


@torch.no_grad()
def accuracies(
    model: nn.Module, data: TensorDataset, classes: Sequence[int], *, batch_size: int = 256
) -> tuple[float, float]:
    """Return the accuracy, and the accuracy with logits restricted to some classes.

    Several rivals report only the second (their *local accuracy*): a device with two classes then
    tells apart two and not all.

    Parameters
    ----------
    model : nn.Module
        Maps inputs ``[B, ...]`` to logits ``[B, C]``.
    data : TensorDataset
        ``(x [n, ...], y [n])``, where the model is; without samples, both are nan.
    classes : sequence of int
        Of the device.
    """
    right = masked_right = total = 0
    with evaluating(model):
        for x, y in DataLoader(data, batch_size=batch_size):
            logits = model(x)
            allowed = torch.tensor(classes, device=logits.device)
            right += int((logits.argmax(dim=1) == y).sum())
            masked_right += int((allowed[logits[:, allowed].argmax(dim=1)] == y).sum())
            total += len(y)
    return (right / total, masked_right / total) if total else (math.nan, math.nan)
