"""The offline stage of an experiment: one dense start, and what each kind of method makes of it.

Every preparation starts from the same trained whole model of its seed, so a comparison is about
methods and not about starts. Models are saved as soon as they are made: a resumed run reads them,
and so do other runs that share the folder and would make the very same ones (`offline_digest`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset

from eclm_flower import PrototypingConfig, prototype
from eclm_flower.modular import ModularModel
from eclm_flower.prototyping import accuracy
from simulations.augmentation import augmentation_of
from simulations.offline_digest import digest_of_kind, digest_of_start
from simulations.settings import Settings
from simulations.world import World, usual_shares
from strategies.offline import Offline, prepare

DENSE = "dense"


class OfflineStage:
    """The prepared cloud models of one seed.

    Parameters
    ----------
    world : World
        The seed.
    settings : Settings
        The experiment. The world may have what devices are told of it: nothing of how the cloud
        trains.
    console : Console
        Where progress is shown.

    Attributes
    ----------
    accuracies : dict[str, float]
        "dense" and each kind of preparation made so far -> accuracy of the whole model on the
        cloud's test data.
    """

    def __init__(self, world: World, settings: Settings, console: Console) -> None:
        self._world, self._folder, self._console = world, settings.offline_folder, console
        self._config = config_of(world, settings)
        # What only sub-models are trained by is left out, so that fleets share a whole model.
        self._dense_config = replace(
            self._config,
            enhancing_epochs=0,
            selector_epochs=0,
            delta_share=0,
            distillation=0,
            sub_tasks_per_device=PrototypingConfig.sub_tasks_per_device,
            budget_shares=PrototypingConfig.budget_shares,
        )
        self.accuracies: dict[str, float] = {}

    def model(self, kind: Offline) -> ModularModel:
        """Return the model of a kind, a new copy with every call."""
        self._folder.mkdir(parents=True, exist_ok=True)
        model = self._world.build_model().to(self._world.settings.compute)
        with self._alone(DENSE):
            if not self._load(model, DENSE):
                self._train(model)
                self._keep(model, DENSE)
        self._measure(model, DENSE)
        with self._alone(kind):
            if not self._load(model, kind):
                self._prepare(model, kind)
                self._keep(model, kind)
        self._measure(model, kind)
        return model.eval().cpu()

    def _train(self, model: ModularModel) -> None:
        self._say("training the whole model")
        prototype(
            model,
            self._proxy,
            sub_tasks=self._world.environment.proxy_sub_tasks,
            config=self._dense_config,
            augment=augmentation_of(self._world),
        )

    def _prepare(self, model: ModularModel, kind: Offline) -> None:
        self._say(f"preparing it for methods of the kind '{kind}'")
        prepare(
            model,
            self._proxy,
            offline=kind,
            config=self._config,
            sub_tasks=self._world.environment.proxy_sub_tasks,
            augment=augmentation_of(self._world),
        )

    def _measure(self, model: ModularModel, name: str) -> None:
        if name not in self.accuracies:
            self.accuracies[name] = accuracy(model, self._world.environment.cloud_test())

    def _say(self, what: str) -> None:
        settings, samples = self._world.settings, len(self._world.environment.proxy_rows)
        self._console.print(
            f"Seed {self._world.seed}, {settings.dataset}, {samples} proxy samples: {what}."
        )

    @cached_property
    def _proxy(self) -> TensorDataset:
        return self._world.environment.proxy()

    @cached_property
    def _start(self) -> str:
        return digest_of_start(
            self._world.build_model(),
            self._proxy,
            self._world.environment.proxy_sub_tasks,
            self._dense_config,
            augmentation_of(self._world),
            self._world.settings.compute,
        )

    def _path(self, name: str) -> Path:
        digest = self._start
        if name != DENSE:
            digest = digest_of_kind(digest, name, self._config)
        return self._folder / f"{name}-{self._world.seed}-{digest}.safetensors"

    def _alone(self, name: str) -> FileLock:
        """Let one process make a model, and others that want the same wait for it."""
        return FileLock(self._path(name).with_suffix(".lock"))

    def _load(self, model: ModularModel, name: str) -> bool:
        if self._path(name).exists():
            model.load_state_dict(load_file(self._path(name)))
        return self._path(name).exists()

    def _keep(self, model: ModularModel, name: str) -> None:
        unfinished = self._path(name).with_suffix(f".{os.getpid()}.unfinished")
        state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(state, unfinished)
        unfinished.replace(self._path(name))


def config_of(world: World, settings: Settings) -> PrototypingConfig:
    """Set the offline stage's parameters; simulated devices see as many sub-tasks as real ones."""
    return PrototypingConfig(
        seed=world.seed,
        epochs=settings.epochs,
        enhancing_epochs=settings.enhancing_epochs,
        delta_share=settings.delta_share,
        distillation=settings.distillation,
        sub_tasks_per_device=(1, _sub_tasks_seen(world)),
        budget_shares=usual_shares(settings.fleet),
    )


def _sub_tasks_seen(world: World) -> int:
    """Most sub-tasks of a real device's data: its classes, or one view and perhaps the next."""
    settings = world.settings
    number = int(world.environment.proxy_sub_tasks.max()) + 1
    if settings.feature_shift == "known":
        return min(2, number)
    if settings.alpha:
        held = [len(world.data(device, 0).classes) for device in range(settings.devices)]
        return min(number, int(np.ceil(np.mean(held))))
    return min(number, settings.classes_per_device or 1)
