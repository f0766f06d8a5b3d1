"""A tiny federation of unequal devices that runs any method, as the simulations do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import TensorDataset

from eclm_flower import Budget, modularize, profile
from eclm_flower.adaptation import DeviceProfile
from eclm_flower.federation import InProcessGrid, MeteredGrid
from eclm_flower.modular import ModularModel
from strategies import Method
from strategies.windows import numbers_within

FEATURES, CLASSES, MODULES, DEVICES = 12, 4, 8, 5


@dataclass(frozen=True)
class Settings:
    """How devices train."""

    learning_rate: float = 0.05
    batch_size: int = 16
    local_epochs: int = 1
    masked_loss: bool = False


def build_model() -> ModularModel:
    """Two module layers, a batch norm inside the first one, and a shared head."""
    return copy.deepcopy(_template())


@cache
def _template() -> ModularModel:
    torch.manual_seed(0)
    body = nn.Sequential(
        *(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()),
        *(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
    )
    model = modularize(
        body,
        modules_per_layer=MODULES,
        example_input=torch.zeros(1, FEATURES),
        selector_share=0.5,
    )
    nn.init.normal_(model.selector.heads.weight)
    assert model.costs  # measured once for all copies
    return model


def local_data(device: int) -> TensorDataset:
    """Samples of classes `device` and the next two, modulo `CLASSES`."""
    generator = torch.Generator().manual_seed(device)
    y = (device + torch.randint(0, 3, (20 + 4 * device,), generator=generator)) % CLASSES
    x = torch.randn(len(y), FEATURES, generator=generator) + 2 * F.one_hot(y, FEATURES)
    return TensorDataset(x, y)


def budget_of(model: ModularModel, device: int) -> Budget:
    """From an eighth of the model to the whole of it, short of another resource each."""
    share = (0.13, 0.25, 0.4, 0.7, 1.0)[device]
    resources = ("communication_bytes", "computation_flops", "memory_bytes")
    least = {name: share * (1 + 0.2 * ((device + i) % 3)) for i, name in enumerate(resources)}
    return Budget.share_of(model.costs, **least)


def app_for(
    method: Method,
    *,
    settings: Settings | None = None,
    seen: list[Message] | None = None,
    opened: Callable[[int, nn.Module], None] = lambda device, model: None,
) -> ClientApp:
    """Build the devices' app: `seen` collects requests, `opened` is told every module received."""
    app = ClientApp()
    model = build_model()
    settings = settings or Settings()

    def receive(msg: Message, context: Context) -> tuple[int, TensorDataset, nn.Module]:
        if seen is not None:
            seen.append(msg)
        device = int(context.node_config["partition-id"])
        own, data = method.receive(msg, model), local_data(device)
        method.select(own, data, torch.Generator().manual_seed(device))
        opened(device, own)
        return device, data, own

    @app.query()
    def query(msg: Message, context: Context) -> Message:
        if seen is not None:
            seen.append(msg)
        device = int(context.node_config["partition-id"])
        inputs = [local_data(device).tensors[0]]
        return profile(msg, context, model, inputs, budget=budget_of(model, device))

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        device, data, own = receive(msg, context)
        loss = method.adapt(own, data, settings, torch.Generator().manual_seed(device))
        return method.reply(msg, own, num_examples=len(data), metrics={"loss": loss})

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        _, data, own = receive(msg, context)
        x, y = data.tensors
        with torch.no_grad():
            accuracy = float((own.eval()(x).argmax(1) == y).float().mean())
        return method.reply(msg, num_examples=len(data), metrics={"accuracy": accuracy})

    return app


def grid_of(app: ClientApp) -> MeteredGrid:
    """A grid of `DEVICES` devices that counts bytes."""
    return MeteredGrid(InProcessGrid(app, DEVICES))


def run(method: Method, *, rounds: int = 2, seed: int = 0, app: ClientApp | None = None, **options):
    """Run rounds of a method; all devices train by default, if its devices train for others."""
    model = build_model()
    if not method.federated:
        options = {**options, "fraction_train": 0.0}
    strategy = method.strategy(model, seed=seed, **options)
    grid = grid_of(app or app_for(method))
    result = strategy.start(grid, method.arrays(model), num_rounds=rounds)
    return strategy, result


def widest(device: int) -> dict[str, int]:
    """Modules of each layer in the widest sub-model that a device's budget allows."""
    model = build_model()
    return numbers_within(model.costs, budget_of(model, device))


def profile_of(device: int) -> DeviceProfile:
    """What a device tells of itself, without importance."""
    model = build_model()
    return DeviceProfile(device=device, budget=budget_of(model, device))


def received(method: Method) -> dict[int, nn.Module]:
    """Modules as devices received them, by device; nobody trains."""
    modules: dict[int, nn.Module] = {}
    app = app_for(method, opened=modules.__setitem__)
    run(method, rounds=1, app=app, fraction_train=0.0)
    return modules
