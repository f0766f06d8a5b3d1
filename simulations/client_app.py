"""The device's side of the simulation: one ClientApp for every method and engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eclm_flower import class_prior, profile
from eclm_flower.federation import ModuleCache
from eclm_flower.federation.differences import ErrorFeedback
from eclm_flower.modular.selection import count
from simulations.accuracies import accuracies
from simulations.clock import seconds_of_work
from simulations.compute import placed
from simulations.environment import DeviceData
from simulations.held import device_folder, keep, opened
from simulations.plan import local_epochs
from simulations.settings import Settings
from simulations.threads import one_thread
from simulations.world import World, world_of
from strategies import METHODS
from strategies.guard import adapt_guarded, judged
from strategies.method import Method

app = ClientApp()

TRAIN, ADAPT, SELECT = 0, 1, 2  # purposes of a device's random numbers


class _ReadOnlyCache(ModuleCache):
    """A cache for the experimenter's messages, which a real device would not get."""

    def put(self, *_: object) -> None:
        """Keep nothing."""


@dataclass(frozen=True)
class _Task:
    """What a message asks of this device.

    Attributes
    ----------
    step, moment : int
        Of the run; a moment is a round, or the beginning of a step.
    local : bool
        Adapt the model to the device's own data.
    keeps : bool
        Keep the adapted model for the next step.
    delivery : bool
        The model is handed out for use; else an evaluation is the experimenter's.
    """

    world: World
    method: Method
    device: int
    step: int
    moment: int
    local: bool
    keeps: bool
    delivery: bool
    folder: Path

    def generator(self, purpose: int) -> torch.Generator:
        """Random numbers of this device, moment and purpose alone."""
        return generator_of(self.world.seed, self.device, self.moment, purpose)

    @property
    def shifts_next(self) -> bool:
        """Whether a step follows in which data is other data."""
        settings, following = self.world.settings, self.step + 1
        return following < settings.steps and settings.phase(following) > settings.phase(self.step)

    def data(self, step: int) -> DeviceData:
        """Return what this device holds in a step, where models compute."""
        return placed(self.world.data(self.device, step), self.world.settings.compute)

    def arrived(self) -> TensorDataset:
        """Return the training samples that came with this step; all, if none did."""
        data = self.data(self.step).train
        known = set(_samples(self.data(self.step - 1).train))
        new = [row for row, sample in enumerate(_samples(data)) if sample not in known]
        return TensorDataset(*data[new]) if new else data

    @contextmanager
    def prior(self, model: nn.Module) -> Iterator[None]:
        """Let a model know this device's classes, if the method or the settings say so.

        Methods say so for label skew alone: else a prior is what chance makes of a few samples.
        """
        own = self.method.class_prior and self.world.has_label_skew
        with ExitStack() as stack:
            if own or self.world.settings.class_prior:
                labels = self.world.data(self.device, self.step).train.tensors[1]
                # What is a list holds networks of which the device uses one.
                for network in model if isinstance(model, nn.ModuleList) else [model]:
                    stack.enter_context(class_prior(network, labels))
            yield

    def cache(self, *, stores: bool = True) -> ModuleCache | None:
        """Return the device's module cache, if it has one."""
        if not (self.world.settings.module_cache and self.method.cached):
            return None
        return (ModuleCache if stores else _ReadOnlyCache)(self.folder / "modules")

    def opened(self, msg: Message, *, stores: bool = True) -> tuple[Message, nn.Module]:
        """Open the model a message carries, or else the one this device holds.

        Returns
        -------
        tuple[Message, nn.Module]
            The message that the cloud sent the model in, and the model.
        """
        state = None
        if not msg.content.array_records:
            msg, state = opened(self.folder, msg)
        # What is held came earlier: the cache may be newer by now, and stays as it is.
        cache = self.cache(stores=stores and state is None)
        options: dict[str, object] = {}
        if cache is not None:
            options["cache"] = cache
        if self.method.feedback:
            options["feedback"] = ErrorFeedback(self.folder / "lost")
        model = self.method.receive(msg, self.world.model, **options)
        if state is not None:
            model.load_state_dict(state)
        model.to(self.world.settings.compute)
        self.select(model)
        return msg, model

    def select(self, model: nn.Module) -> None:
        """Let the method select in a model what serves this device's data best."""
        with self.prior(model):
            self.method.select(model, self.data(self.step).train, self.generator(SELECT))


def _samples(data: TensorDataset) -> list[bytes]:
    """Return the inputs, to be compared."""
    return [sample.tobytes() for sample in data.tensors[0].cpu().numpy()]


def generator_of(seed: int, device: int, moment: int, purpose: int) -> torch.Generator:
    """Random numbers of a run's seed, a device, a moment and a purpose alone."""
    entropy = [seed, device, moment, purpose]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def _task(msg: Message, context: Context) -> _Task:
    config = msg.content.config_records["config"]
    settings = Settings.from_json(str(config["settings"]))
    seed, strategy = int(config["seed"]), str(config["strategy"])  # type: ignore[arg-type]
    device = int(context.node_config["partition-id"])
    out = Path(str(config["out"]).rstrip())
    return _Task(
        world=world_of(settings, seed),
        method=METHODS[strategy],
        device=device,
        step=int(config["step"]),  # type: ignore[arg-type]
        moment=int(config["moment"]),  # type: ignore[arg-type]
        local=bool(config["local"]),
        keeps=bool(config["keeps"]),
        delivery=bool(config["delivery"]),
        folder=device_folder(out, seed=seed, strategy=strategy, device=device),
    )


@app.query()
def query(msg: Message, context: Context) -> Message:
    """Tell the cloud this device's budget and, if asked, what matters to its data."""
    task = _task(msg, context)
    world, device = task.world, task.device
    with one_thread():
        return profile(
            msg,
            context,
            world.model,
            lambda: DataLoader(world.data(device, task.step).train, batch_size=256),
            budget=world.budget(device, task.moment),
            cache=task.cache(),
        )


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train what the cloud sent on local data."""
    task = _task(msg, context)
    data = task.data(task.step).train
    with one_thread():
        _, model = task.opened(msg)
        with task.prior(model):
            loss = task.method.adapt(model, data, task.world.settings, task.generator(TRAIN))
        model.cpu()
    return task.method.reply(
        msg, model, num_examples=len(data), metrics={"loss": loss, "device": task.device}
    )


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Test what the cloud sent, before and after local adaptation, now and after the next shift."""
    task = _task(msg, context)
    world, settings = task.world, task.world.settings
    data = task.data(task.step)
    with one_thread():
        original, model = task.opened(msg, stores=task.delivery)
        shifts = task.delivery and task.shifts_next
        held = fallback = math.nan
        with task.prior(model):
            before = after = accuracies(model, data.test, data.classes)
            if task.local:
                adapt = task.method.adapt
                if settings.guard:
                    adapt = partial(adapt_guarded, adapt)
                adapt(model, data.train, settings, task.generator(ADAPT))
                after = accuracies(model, data.test, data.classes)
            if shifts:
                next_data = task.data(task.step + 1)
                held, _ = accuracies(model, next_data.test, next_data.classes)
        if shifts:
            fallback = _with_fallback(replace(task, step=task.step + 1), original, model)
    if task.keeps:
        keep(task.folder, original, model)
    modules = task.method.modules(original, world.model)
    seconds = seconds_of_work(
        world.fleet[task.device],
        world.conditions(task.device, task.moment),
        flops=world.model.costs.of(modules).computation_flops,
        samples=len(data.train),
        epochs=local_epochs(task.method, settings) if task.local else 0,
    )
    return task.method.reply(
        msg,
        num_examples=len(data.test),
        metrics={
            "device": task.device,
            "accuracy-before": before[0],
            "accuracy-after": after[0],
            "masked-before": before[1],
            "masked-after": after[1],
            "accuracy-held": held,
            "accuracy-fallback": fallback,
            "modules": count(modules),
            "memory": world.model.costs.of(modules).memory_bytes,
            "seconds": seconds,
        },
    )


def _with_fallback(task: _Task, original: Message, adapted: nn.Module) -> float:
    """Test the better of the two models that a device has when a step begins.

    It still has what the cloud sent, and knows the labels of its new data: neither training nor
    the cloud is needed to tell both models its classes and see which serves that data better. Data
    that it had before is not asked: the adapted model was trained on it.
    """
    data, arrived = task.data(task.step), task.arrived()
    _, sent = task.opened(original, stores=False)
    task.select(adapted)
    found = []
    for model in (adapted, sent):
        with task.prior(model):
            accuracy, _ = accuracies(model, data.test, data.classes)
            found.append((judged(model, arrived), accuracy))
    return max(found, key=lambda of_model: of_model[0])[1]
