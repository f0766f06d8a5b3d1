"""Nodes that are no more than a function: a load for the server's side of a very large fleet."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from eclm_flower import Budget
from eclm_flower.adaptation import DeviceProfile
from eclm_flower.federation.messages import profile_to_metrics
from eclm_flower.modular import ModularModel


class AnsweringGrid(Grid):
    """A grid without ClientApps: queries are answered with random importance, sub-models returned.

    As on Flower, node ids are random numbers of 64 bits, and a list of them is made anew whenever
    it is asked for.

    Parameters
    ----------
    model : ModularModel
        The cloud model.
    nodes : int
        How many there are; node i is device i.
    budget : Budget
        What every device tells.
    """

    def __init__(self, model: ModularModel, nodes: int, budget: Budget) -> None:
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self._modules = {layer.name: layer.modules for layer in model.layers.values()}
        self._budget = budget
        numbers = np.random.default_rng(0).integers(2**32, 2**63, nodes, dtype=np.uint64)
        self._node_ids = np.unique(numbers)
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:  # noqa: D102
        return self._node_ids.tolist()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # noqa: D102
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id
            content = self._told(message) if message.metadata.message_type == "query" else None
            self._replies[message_id] = Message(content or _returned(message), reply_to=message)
            ids.append(message_id)
        return ids

    def _told(self, message: Message) -> RecordDict:
        # Of numpy's own type, or all ids would be converted, at each message and to floats.
        node_id = np.uint64(message.metadata.dst_node_id)
        device = int(np.searchsorted(self._node_ids, node_id))
        importance = {}
        if message.content.array_records:
            rng = np.random.default_rng(device)
            importance = {name: rng.dirichlet(np.ones(n)) for name, n in self._modules.items()}
        told = DeviceProfile(device=device, budget=self._budget, importance=importance)
        return RecordDict({"profile": profile_to_metrics(told)})

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:  # noqa: D102
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(  # noqa: D102
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def get_nodes(self) -> Iterable[Any]:  # noqa: D102
        raise NotImplementedError("These nodes have nothing but a number.")

    def set_run(self, run: Any) -> None:  # noqa: D102
        raise NotImplementedError("This grid is a run of its own.")

    @property
    def run(self) -> Any:  # noqa: D102
        from flwr.supercore.run import Run

        return Run.create_empty(run_id=1)

    def create_message(  # noqa: D102
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)


def _returned(message: Message) -> RecordDict:
    """Return a sub-model as it came."""
    key, arrays = next(iter(message.content.array_records.items()))
    own: ArrayRecord = arrays
    return RecordDict({key: own, "metrics": MetricRecord({"num-examples": 10})})
