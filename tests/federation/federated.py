"""A small federation for tests: two-class data, an MLP, a ClientApp as a user would write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from eclm_flower import Budget, modularize, profile, receive, reply
from eclm_flower.federation import InProcessGrid
from eclm_flower.federation.cache import ModuleCache
from eclm_flower.modular import ModularModel

FEATURES, CLASSES = 12, 4


def build_model(modules: int = 4, **options) -> ModularModel:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    )
    model = modularize(
        body,
        modules_per_layer=modules,
        example_input=torch.zeros(1, FEATURES),
        selector_share=0.5,
        **options,
    )
    nn.init.normal_(model.selector.heads.weight)
    return model


def local_data(device: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(device)
    y = torch.randint(0, CLASSES, (20 + 4 * device,), generator=generator)
    x = torch.randn(len(y), FEATURES, generator=generator) + 2 * F.one_hot(y, FEATURES)
    return x, y


def train_locally(model: nn.Module, device: int, learning_rate: float = 0.1) -> float:
    x, y = local_data(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for _ in range(2):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def eclm_app(
    *,
    budget: Callable[[ModularModel, int], Budget] = lambda model, device: Budget(),
    modules: int = 4,
    spoil: Callable[[int, Message], Message | None] = lambda device, answer: answer,
    seen: list[Message] | None = None,
    cache: Callable[[int], ModuleCache | None] = lambda device: None,
    mixture: Callable[[int], list[float] | None] = lambda device: None,
    **options,
) -> ClientApp:
    """A ClientApp for ECLM; `spoil` may change what a device answers, `seen` collects requests."""
    app = ClientApp()
    model = build_model(modules, **options)

    def number(context: Context) -> int:
        return int(context.node_config["partition-id"])

    @app.query()
    def query(msg: Message, context: Context) -> Message:
        x, _ = local_data(number(context))
        return profile(
            msg,
            context,
            model,
            [x],
            budget=budget(model, number(context)),
            mixture=mixture(number(context)),
            cache=cache(number(context)),
        )

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        if seen is not None:
            seen.append(msg)
        sub_model = receive(msg, model, cache=cache(number(context)))
        loss = train_locally(sub_model, number(context))
        x, _ = local_data(number(context))
        return spoil(
            number(context), reply(msg, sub_model, num_examples=len(x), metrics={"loss": loss})
        )

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        sub_model = receive(msg, model, cache=cache(number(context))).eval()
        x, y = local_data(number(context))
        accuracy = float((sub_model(x).argmax(1) == y).float().mean())
        return spoil(
            number(context), reply(msg, num_examples=len(x), metrics={"accuracy": accuracy})
        )

    return app


def fedavg_app() -> ClientApp:
    """The same app as its author wrote it for FedAvg."""
    app = ClientApp()

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        device = int(context.node_config["partition-id"])
        model = build_model(1).body
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        loss = train_locally(model, device)
        metrics = MetricRecord({"loss": loss, "num-examples": len(local_data(device)[0])})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=msg)

    return app


def grid_of(app: ClientApp, nodes: int = 4, **options) -> InProcessGrid:
    return InProcessGrid(app, nodes, **options)
