"""Counting the bytes that records really are on the wire, for any strategy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid


def content_bytes(content: RecordDict) -> int:
    """Count the bytes of a message's content: every object Flower would upload for it."""

    def size(flower_object: Any) -> int:
        children = flower_object.children or {}
        return len(flower_object.deflate()) + sum(size(child) for child in children.values())

    return size(content)


@dataclass
class Traffic:
    """Bytes to and from one node, from the node's point of view."""

    down: int = 0
    up: int = 0


class MeteredGrid(Grid):
    """A grid that counts what passes through it, by message type and node.

    Parameters
    ----------
    grid : Grid
        The grid that does the work.

    Attributes
    ----------
    traffic : dict[str, dict[int, Traffic]]
        Message type ("train", "evaluate", "query") -> node id -> bytes since the last `reset`.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.traffic: dict[str, dict[int, Traffic]] = {}
        self.reset()

    def reset(self) -> None:
        """Start counting at zero again."""
        self.traffic = defaultdict(lambda: defaultdict(Traffic))

    def _count_down(self, messages: Iterable[Message]) -> list[Message]:
        messages = list(messages)
        for message in messages:
            meter = self.traffic[message.metadata.message_type][message.metadata.dst_node_id]
            meter.down += content_bytes(message.content)
        return messages

    def _count_up(self, replies: Iterable[Message]) -> list[Message]:
        replies = list(replies)
        for reply in replies:
            if reply.has_content():
                meter = self.traffic[reply.metadata.message_type][reply.metadata.src_node_id]
                meter.up += content_bytes(reply.content)
        return replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # noqa: D102
        return self._grid.push_messages(self._count_down(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:  # noqa: D102
        return self._count_up(self._grid.pull_messages(message_ids))

    def send_and_receive(  # noqa: D102
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        messages = self._count_down(messages)
        return self._count_up(self._grid.send_and_receive(messages, timeout=timeout))

    def set_run(self, run: Any) -> None:  # noqa: D102
        self._grid.set_run(run)

    @property
    def run(self) -> Any:  # noqa: D102
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:  # noqa: D102
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:  # noqa: D102
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:  # noqa: D102
        return self._grid.get_nodes()
