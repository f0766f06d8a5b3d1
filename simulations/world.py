"""Everything that follows from settings and a seed: data, devices, the cloud model's structure.

Server and devices build it alike, each in its own process; nothing of it travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eclm_flower import Budget, PrototypingConfig, modularize
from eclm_flower.modular import ModularModel
from simulations.datasets import load_data
from simulations.environment import Environment
from simulations.fleet import Device, draw_fleet
from simulations.models import build_model
from simulations.settings import Settings


@dataclass(frozen=True)
class World:
    """One seed of an experiment."""

    settings: Settings
    seed: int

    @cached_property
    def environment(self) -> Environment:
        """Who sees which data."""
        settings = self.settings
        data_dir = Path(settings.data_dir) if settings.data_dir else None
        return Environment(
            _data(settings.dataset, data_dir),
            devices=settings.devices,
            classes_per_device=settings.classes_per_device or None,
            seed=self.seed,
        )

    @cached_property
    def fleet(self) -> list[Device]:
        """Who the devices are."""
        return draw_fleet(self.settings.devices, seed=self.seed)

    @cached_property
    def model(self) -> ModularModel:
        """The modular cloud model, with its initial weights."""
        return self.build_model()

    def build_model(self) -> ModularModel:
        """Build the modular cloud model anew."""
        shape = self.environment.input_shape
        body = build_model(self.settings.model, shape, self.environment.num_classes, seed=self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return modularize(
                body,
                modules_per_layer=self.settings.modules,
                example_input=torch.zeros(1, *shape),
            )

    def budget(self, device: int) -> Budget:
        """Return what a device can spend: always a module in every layer, or it could not join."""
        least = self.model.costs.least_share
        who = self.fleet[device]
        return Budget.share_of(
            self.model.costs,
            communication_bytes=max(who.communication_share, least),
            computation_flops=max(who.computation_share, least),
            memory_bytes=max(who.memory_share, least),
        )

    def prototyping(self) -> PrototypingConfig:
        """Set the offline stage's parameters; simulated devices see as many sub-tasks as real."""
        seen = self.settings.classes_per_device or 1
        return PrototypingConfig(
            seed=self.seed,
            epochs=self.settings.epochs,
            enhancing_epochs=self.settings.enhancing_epochs,
            sub_tasks_per_device=(1, seen),
            budget_shares=_usual_shares(),
        )


def _usual_shares() -> tuple[float, ...]:
    """Return what devices can hold of the cloud model: deciles of fleets like the simulated one.

    A cloud knows its market, not the very devices; so another fleet is drawn.
    """
    scarcest = [
        min(device.memory_share, device.computation_share, device.communication_share)
        for device in draw_fleet(1000, seed=1_000_000)
    ]
    return tuple(float(share) for share in np.quantile(scarcest, [0.1, 0.3, 0.5, 0.7, 0.9]))


@lru_cache(maxsize=2)
def world_of(settings: Settings, seed: int) -> World:
    """Return the world of a seed, built once per process."""
    return World(settings, seed)


_data = lru_cache(maxsize=2)(load_data)


def flip_and_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip and shift photographs at random, each its own way: ``[B, C, y, x]``, padding 4."""
    number, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, number, 1), generator=generator)
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = (left + torch.arange(width))[:, None, None, :]
    images = torch.arange(number)[:, None, None, None]
    channels = torch.arange(x.shape[1])[None, :, None, None]
    cropped = padded[images, channels, rows, columns]
    flipped = torch.rand(number, 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped, cropped.flip(3), cropped)
