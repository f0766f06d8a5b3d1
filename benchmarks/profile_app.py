"""The device's side of `round_profile`, with its own clock; a module that Ray's workers import."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from benchmarks.stopwatch import Stopwatch
from eclm_flower import Budget, modularize, profile, receive, reply
from eclm_flower.modular import ModularModel, slim_resnet

SHARE, IMAGES, BATCH = 0.25, 32, 16
FOLDER = "ECLM_PROFILE_FOLDER"  # where workers on Ray leave their times; unset in one process

WATCH = Stopwatch()  # of this process
app = ClientApp()


@lru_cache(maxsize=1)
def model_of_process() -> ModularModel:
    """Build the cloud model, once per process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return modularize(slim_resnet(), example_input=torch.zeros(1, 3, 32, 32))


@lru_cache(maxsize=1)
def data_of_process() -> tuple[torch.Tensor, torch.Tensor]:
    """Make random images and classes, equal on all devices: only times matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, 3, 32, 32, generator=generator)
    return x, torch.randint(0, 10, (IMAGES,), generator=generator)


def train(model: nn.Module) -> None:
    """Train for an epoch."""
    x, y = data_of_process()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for start in range(0, IMAGES, BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[start : start + BATCH]), y[start : start + BATCH]).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Return the accuracy."""
    x, y = data_of_process()
    return float((model.eval()(x).argmax(1) == y).float().mean())


@app.query()
def _query(msg: Message, context: Context) -> Message:
    model = model_of_process()
    budget = Budget.share_of(model.costs, communication_bytes=SHARE)
    with WATCH.timing("query: profile"):
        answer = profile(msg, context, model, [data_of_process()[0]], budget=budget)
    return _noted(answer)


@app.train()
def _train(msg: Message, context: Context) -> Message:
    with WATCH.timing("unpack: receive"):
        sub_model = receive(msg, model_of_process())
    with WATCH.timing("train: the user's loop"):
        train(sub_model)
    with WATCH.timing("pack: reply"):
        answer = reply(msg, sub_model, num_examples=IMAGES)
    return _noted(answer)


@app.evaluate()
def _evaluate(msg: Message, context: Context) -> Message:
    with WATCH.timing("unpack: receive"):
        sub_model = receive(msg, model_of_process())
    with WATCH.timing("evaluate: the user's loop"):
        accuracy = evaluate(sub_model)
    with WATCH.timing("pack: reply"):
        answer = reply(msg, num_examples=IMAGES, metrics={"accuracy": accuracy})
    return _noted(answer)


def _noted(answer: Message) -> Message:
    """Leave this process's times where the server finds them, before it has the answer."""
    if FOLDER in os.environ:
        path = Path(os.environ[FOLDER]) / f"{os.getpid()}.json"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(WATCH.seconds))
        unfinished.replace(path)
    return answer


def seconds_of_workers(folder: Path) -> Counter[str]:
    """Add up the times that workers left."""
    total: Counter[str] = Counter()
    for path in folder.glob("*.json"):
        total.update(json.loads(path.read_text()))
    return total
