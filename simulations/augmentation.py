"""Augmentation of the cloud's training batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eclm_flower.prototyping.proxy import Augment
from simulations.world import World


def augmentation_of(world: World) -> Augment | None:
    """Return the augmentation of the offline stage: of photographs, none of anything else."""
    shape = world.environment.input_shape
    photographs = world.environment.images and len(shape) == 3 and shape[0] == 3
    return flip_and_crop if photographs else None


def flip_and_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip photographs ``[B, C, y, x]`` at random, and shift them by up to an eighth."""
    number, _, height, width = x.shape
    most = max(height, width) // 8  # 4 of 32 pixels, as is usual
    padded = F.pad(x, (most, most, most, most))
    top, left = torch.randint(0, 2 * most + 1, (2, number, 1), generator=generator).to(x.device)
    rows = (top + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=x.device))[:, None, None, :]
    images = torch.arange(number, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    cropped = padded[images, channels, rows, columns]
    flipped = torch.rand(number, 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped.to(x.device), cropped.flip(3), cropped)
