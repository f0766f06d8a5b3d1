"""What the cloud makes of 100,000 broken replies: none may crash it, or change anything.

Replies of a training round and profiles are drawn, broken in one to three ways and read, with the
replies of three honest devices beside them::

    python -m benchmarks.fuzz --number 100000 --seed 0

Every reply must end as accepted or as refused with a reason; what is accepted must merge to finite
numbers (a profile: give a sub-model within its budget); the honest devices must always be merged;
the cloud model must stay as it is; and memory must not grow.
"""

from __future__ import annotations

import hashlib
import logging
import resource
import time
from collections import Counter
from typing import Annotated

import numpy as np
import torch
import typer
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from benchmarks.broken_replies import IN_PROFILES, IN_REPLIES, broken
from eclm_flower import Budget, modularize, receive, reply
from eclm_flower.adaptation import DeviceProfile, Limits, derive, merge
from eclm_flower.errors import InfeasibleBudgetError, ReplyError
from eclm_flower.federation import InProcessGrid
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.messages import (
    BATCH_NORM,
    profile_from_content,
    profile_to_metrics,
)
from eclm_flower.federation.replies import Request, Training
from eclm_flower.modular import ModularModel
from eclm_flower.modular.selection import count

HONEST = 3
FUZZED = HONEST  # the number of the device whose replies are broken


def main(
    number: Annotated[int, typer.Option(help="Replies to draw.")] = 100_000,
    seed: int = 0,
) -> None:
    """Read broken replies and count what became of them."""
    start = time.perf_counter()
    fuzz(500, seed=seed + 1)  # what is allocated once doesn't count as growth
    before = _peak_megabytes()
    outcomes = fuzz(number, seed=seed)
    for outcome, times in sorted(outcomes.items()):
        print(f"{outcome:28} {times:8,}")
    growth = _peak_megabytes() - before
    print(f"{number:,} replies in {time.perf_counter() - start:.0f} s, no crash; ", end="")
    print(f"the cloud model is what it was; peak memory grew by {growth:.0f} MB")


def fuzz(number: int, *, seed: int) -> Counter[str]:
    """Draw and read broken replies.

    Returns
    -------
    Counter
        Outcomes: kind of reply and "accepted" or why not.

    Raises
    ------
    AssertionError
        A reply had an effect it must not have. Any other error is a crash of what reads replies.
    """
    rng = np.random.default_rng(seed)
    cloud = _Cloud()
    before = cloud.fingerprint()
    outcomes: Counter[str] = Counter()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # a line for every refused reply
    try:
        for _ in range(number):
            if rng.random() < 0.3:
                outcomes[f"profile {cloud.read_profile(rng)}"] += 1
            else:
                outcomes[f"reply {cloud.read_reply(rng)}"] += 1
            assert cloud.fingerprint() == before, "a reply changed the cloud model"
    finally:
        logging.disable(previous)
    return outcomes


class _Cloud:
    """A cloud in the middle of a round: what it asked, and what honest devices answered."""

    def __init__(self) -> None:
        InProcessGrid(ClientApp(), 1)  # messages can only be made inside a run
        self.model = _model()
        arrays = ArrayRecord(self.model.state_dict())
        self.cloud = CloudModel.opened(self.model, arrays, version=0)
        self.state = self.cloud.state
        self.layers = list(self.model.layers.values())
        self.selection = {"0": (0, 2, 3)}
        self.importance = {name: np.full(4, 0.25) for name in self.selection}
        self.profile = DeviceProfile(
            device=FUZZED,
            budget=Budget.share_of(self.model.costs, memory_bytes=0.5),
            importance=self.importance,
        )
        self.messages = [self._question(device) for device in range(HONEST + 1)]
        self.requests = [
            Request(device, self.selection, message.metadata)
            for device, message in enumerate(self.messages)
        ]
        self.replies = [self._answer(device) for device in range(HONEST + 1)]

    def _question(self, device: int) -> Message:
        arrays, what_it_is = self.cloud.pack(self.selection)
        config = ConfigRecord({**what_it_is, BATCH_NORM: "frozen"})
        content = RecordDict({"arrays": arrays, "config": config})
        message = Message(content, dst_node_id=device + 1, message_type="train")
        message.metadata.__dict__["_message_id"] = f"question {device}"
        return message

    def _answer(self, device: int) -> Message:
        sub_model = receive(self.messages[device], self.model)
        generator = torch.Generator().manual_seed(device)
        with torch.no_grad():
            for parameter in sub_model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        metrics = {"loss": 0.5, "curve": [1.0, 0.5]}
        return reply(self.messages[device], sub_model, num_examples=50, metrics=metrics)

    def fingerprint(self) -> str:
        """Digest of all that must not change."""
        digest = hashlib.sha256(repr((self.selection, self.importance)).encode())
        for tensor in (*self.model.state_dict().values(), *self.state.values()):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def read_reply(self, rng: np.random.Generator) -> str:
        """Break a training reply and read it with the honest ones."""
        content = broken(rng, self.replies[FUZZED].content, IN_REPLIES)
        answers = [Message(content, reply_to=self.messages[FUZZED])]
        match rng.integers(40):
            case 0:  # twice
                other = broken(rng, content, IN_REPLIES)
                answers.append(Message(other, reply_to=self.messages[FUZZED]))
            case 1:
                answers.append(Message(Error(2, "boom"), reply_to=self.messages[FUZZED]))
            case 2:
                answers = [Message(Error(int(rng.integers(300))), reply_to=self.messages[FUZZED])]
            case 3:
                answers[0].metadata.__dict__["_reply_to_message_id"] = "a question of yesterday"
        training = Training(
            [*self.replies[:FUZZED], *answers],
            self.requests,
            state=self.state,
            layers=self.layers,
            importance=dict.fromkeys(range(HONEST + 1), self.importance),
            arrayrecord_key="arrays",
            weighted_by_key="num-examples",
            limits=Limits(),
        )
        merged = merge(self.state, iter(training), self.layers)
        assert set(range(HONEST)) <= training.metrics.keys(), "an honest device was refused"
        if FUZZED in training.metrics:
            assert all(_fits(merged[key], tensor) for key, tensor in self.state.items())
            return "accepted"
        return max(training.done().counts, key=len)  # "refused-<reason>" rather than "refused"

    def read_profile(self, rng: np.random.Generator) -> str:
        """Break a profile, read it, and derive what it asks for."""
        content = RecordDict({"profile": profile_to_metrics(self.profile)})
        content = broken(rng, content, IN_PROFILES)
        costs = self.model.costs
        try:
            told = profile_from_content(content, costs)
        except ReplyError as error:
            return f"refused-{error.reason}"
        if not told.importance:
            return "accepted, no importance"
        try:
            selection = derive(told.importance, costs, told.budget)
        except InfeasibleBudgetError:
            return "accepted, infeasible"
        assert told.budget.allows(costs.of(selection))
        assert count(selection) >= len(self.layers)
        return "accepted"


def _model() -> ModularModel:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model = modularize(
        body, modules_per_layer=4, example_input=torch.zeros(1, 6), selector_share=1.0
    )
    torch.nn.init.normal_(model.selector.heads.weight)  # else nobody is asked for importance
    return model


def _fits(merged: Tensor, before: Tensor) -> bool:
    alike = merged.shape == before.shape and merged.dtype == before.dtype
    return alike and bool(merged.isfinite().all())


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    typer.run(main)
