"""The device's side of the simulation: one ClientApp for every method and engine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader

from eclm_flower import profile
from eclm_flower.federation.messages import selection_from_config
from eclm_flower.modular.selection import count, whole
from eclm_flower.prototyping import accuracy
from simulations.environment import DeviceData
from simulations.settings import Settings
from simulations.training import adapt, one_thread
from simulations.world import World, world_of
from strategies import METHODS
from strategies.method import Method

app = ClientApp()

_TRAIN, _ADAPT = 0, 1  # purposes of a device's random numbers


@dataclass(frozen=True)
class _Task:
    """What a message asks of this device."""

    world: World
    method: Method
    device: int
    server_round: int

    @property
    def data(self) -> DeviceData:
        return self.world.environment.device(self.device)

    def generator(self, purpose: int) -> torch.Generator:
        """Random numbers of this device, round and purpose alone."""
        entropy = [self.world.seed, self.device, self.server_round, purpose]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        return torch.Generator().manual_seed(seed)


def _task(msg: Message, context: Context) -> _Task:
    config = msg.content.config_records["config"]
    settings = Settings.from_json(str(config["settings"]))
    return _Task(
        world=world_of(settings, int(config["seed"])),  # type: ignore[arg-type]
        method=METHODS[str(config["strategy"])],
        device=int(context.node_config["partition-id"]),
        server_round=int(config.get("server-round", 0)),  # type: ignore[arg-type]
    )


@app.query()
def query(msg: Message, context: Context) -> Message:
    """Tell the cloud this device's budget and, if asked, what matters to its data."""
    task = _task(msg, context)
    with one_thread():
        return profile(
            msg,
            context,
            task.world.model,
            lambda: DataLoader(task.data.train, batch_size=256),
            budget=task.world.budget(task.device),
        )


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train what the cloud sent on local data."""
    task = _task(msg, context)
    with one_thread():
        model = task.method.receive(msg, task.world.model)
        loss = adapt(model, task.data.train, task.world.settings, task.generator(_TRAIN))
    return task.method.reply(
        msg,
        model,
        num_examples=len(task.data.train),
        metrics={"loss": loss, "device": task.device},
    )


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Test what the cloud sent, before and after local adaptation."""
    task = _task(msg, context)
    with one_thread():
        model = task.method.receive(msg, task.world.model)
        before = accuracy(model, task.data.test)
        start = time.perf_counter()
        adapt(model, task.data.train, task.world.settings, task.generator(_ADAPT))
        seconds = time.perf_counter() - start
        after = accuracy(model, task.data.test)
    held = selection_from_config(msg.content.config_records["config"])
    return task.method.reply(
        msg,
        num_examples=len(task.data.test),
        metrics={
            "device": task.device,
            "accuracy-before": before,
            "accuracy-after": after,
            "modules": count(held or whole(task.world.model.layers.values())),
            "seconds": seconds,
        },
    )
