"""Everything that follows from settings and a seed: data, devices, the cloud model's structure.

Server and devices build it alike, each in its own process; nothing of it travels. A *moment* is one
round, or the beginning of a step; moments count on through a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from eclm_flower import Budget, modularize
from eclm_flower.modular import ModularModel
from simulations.conditions import Conditions, conditions_of, shares_of
from simulations.datasets import LabelledData, load_data
from simulations.environment import DeviceData, Environment, FeatureShift, for_validation
from simulations.fleet import Device, draw_fleet
from simulations.models import build_model
from simulations.settings import JudgedOn, Settings

#: Most sub-tasks that get delta modules: the cloud stores a core, a quarter of a model, for each.
MOST_DELTAS = 128


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
        feature_shift = None
        if settings.feature_shift != "none":
            feature_shift = FeatureShift(
                known=settings.feature_shift == "known",
                names=settings.views,
                strength=settings.strength,
            )
        return Environment(
            _data(
                settings.dataset,
                data_dir,
                settings.resolution or None,
                settings.judged_on,
                # On a GPU, decoding at each visit would take longer than training.
                decoded=settings.compute != "cpu",
            ),
            devices=settings.devices,
            classes_per_device=settings.classes_per_device or None,
            alpha=settings.alpha or None,
            shift=settings.shift,
            feature_shift=feature_shift,
            seed=self.seed,
        )

    @property
    def sub_tasks(self) -> int:
        """Number of sub-tasks that get delta modules: none if classes, for which there's the prior.

        Nor if there are too many.
        """
        number = int(self.environment.proxy_sub_tasks.max()) + 1
        return 0 if self.environment.sub_tasks_are_classes or number > MOST_DELTAS else number

    @property
    def has_label_skew(self) -> bool:
        """Whether data is divided so that devices have some classes more often than others."""
        return bool(self.settings.classes_per_device or self.settings.alpha)

    @cached_property
    def fleet(self) -> list[Device]:
        """Who the devices are."""
        return draw_fleet(self.settings.devices, seed=self.seed, fleet=self.settings.fleet)

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
                sub_tasks=self.sub_tasks,
                example_input=torch.zeros(1, *shape),
            )

    def data(self, device: int, step: int) -> DeviceData:
        """Return what a device holds in an adaptation step."""
        return self.environment.device(device, self.settings.phase(step))

    def conditions(
        self, device: int, moment: int, *, availability: float = 1.0, dropout: float = 0.0
    ) -> Conditions:
        """Return how a device fares at a moment; see `conditions_of`."""
        return conditions_of(
            device,
            moment,
            seed=self.seed,
            still=self.fleet[device].limit is not None,
            availability=availability,
            dropout=dropout,
        )

    def budget(self, device: int, moment: int) -> Budget:
        """Return what a device can spend: always a module in every layer, or it could not join."""
        least = self.model.costs.least_share
        shares = shares_of(self.fleet[device], self.conditions(device, moment))
        return Budget.share_of(
            self.model.costs,
            communication_bytes=max(shares.communication, least),
            computation_flops=max(shares.computation, least),
            memory_bytes=max(shares.memory, least),
        )


def usual_shares(fleet: str) -> tuple[float, ...]:
    """Return what devices can hold of the cloud model: deciles of fleets like the simulated one.

    A cloud knows its market, not the very devices; so another fleet is drawn, each device at a
    moment of its own.
    """
    seed = 1_000_000
    devices = draw_fleet(1000, seed=seed, fleet=fleet)
    scarcest = [
        shares_of(
            device, conditions_of(number, 0, seed=seed, still=device.limit is not None)
        ).scarcest
        for number, device in enumerate(devices)
    ]
    return tuple(float(share) for share in np.quantile(scarcest, [0.1, 0.3, 0.5, 0.7, 0.9]))


@lru_cache(maxsize=2)
def world_of(settings: Settings, seed: int) -> World:
    """Return the world of a seed, built once per process."""
    return World(settings, seed)


@lru_cache(maxsize=2)
def _data(
    name: str,
    data_dir: Path | None,
    resolution: int | None,
    judged_on: JudgedOn,
    *,
    decoded: bool,
) -> LabelledData:
    data = load_data(name, data_dir, resolution)
    data = data.decoded() if decoded else data
    return for_validation(data) if judged_on == "validation" else data
