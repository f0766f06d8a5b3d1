"""One exchange with nodes: messages go out, replies are handed on as they come, until a deadline.

Flower's own `Grid.send_and_receive` looks for replies every 3 seconds in a deployment. Here the
pauses start short and grow while nothing comes, so a quick round is not held up, and a slow one
does not keep the SuperLink busy.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from flwr.app import Error, Message
from flwr.serverapp import Grid

from eclm_flower.federation.traffic import Traffic, content_bytes

_SHORTEST_PAUSE, _LONGEST_PAUSE, _GROWTH = 0.01, 1.0, 1.5  # seconds between two looks
_TOGETHER = 32  # messages of a push: what is packed in memory before any of it is sent

# Flower's error codes (flwr.common.constant.ErrorCode), in words an operator can act on.
_FAILURES = {
    1: "app",  # the ClientApp can't be loaded
    2: "app",  # it raised
    3: "undelivered",  # the request expired or got lost
    4: "undelivered",  # the reply did
    5: "unavailable",  # the node is gone
    6: "app",  # a mod refused
    7: "app",  # its bundle is invalid
    8: "crashed",  # its process ended
}


@dataclass(frozen=True)
class Deadline:
    """A moment until which something waits.

    Parameters
    ----------
    at : float
        On the clock of `time.monotonic`, in seconds.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Set a deadline some seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds left; 0 when it has passed."""
        return max(0.0, self.at - time.monotonic())


def stream(
    grid: Grid,
    messages: Iterable[Message],
    *,
    until: Deadline,
    window: int | None = None,
    traffic: Traffic | None = None,
) -> Iterator[Message]:
    """Send messages and hand on the replies, in the order of the messages, as they come in time.

    A message is taken from `messages` only when it is to be sent, and neither it nor a reply is
    kept. Only replies to these messages are asked for, so one that comes after the deadline is
    never seen again: it can't get into a later round.

    Parameters
    ----------
    grid : Grid
        Where the nodes are.
    messages : iterable of Message
        What to send; may make each when it is asked for.
    until : Deadline
        When to stop waiting. Replies that are there already are taken even if it has passed.
    window : int, optional
        Most messages under way: sent, and the reply not yet handed on. None: all of them.
    traffic : Traffic, optional
        Counts the bytes sent (``down``) and received (``up``).

    Yields
    ------
    Message
        Replies, errors included. Two to the same message are handed on one after the other.
    """
    source = iter(messages)
    under_way: dict[str, list[Message]] = {}  # id of what was sent -> replies that wait their turn
    waiting: set[str] = set()
    pause = _SHORTEST_PAUSE
    all_sent = False
    while under_way or not all_sent:
        room = _TOGETHER if window is None else min(_TOGETHER, window - len(under_way))
        batch = [] if all_sent else list(islice(source, room))
        if batch:
            ids = [message_id for message_id in grid.push_messages(batch) if message_id]
            under_way.update((message_id, []) for message_id in ids)
            waiting.update(ids)
            if traffic is not None:
                traffic.down += sum(content_bytes(message.content) for message in batch)
        all_sent = all_sent or len(batch) < room
        del batch

        came = list(grid.pull_messages(waiting)) if waiting else []
        for reply in came:
            if traffic is not None and reply.has_content():
                traffic.up += content_bytes(reply.content)
            if reply.metadata.reply_to_message_id not in under_way:
                continue  # of an earlier exchange
            under_way[reply.metadata.reply_to_message_id].append(reply)
            waiting.discard(reply.metadata.reply_to_message_id)
        pause = _SHORTEST_PAUSE if came else min(pause * _GROWTH, _LONGEST_PAUSE)
        if came:
            came.clear()
            del reply  # or the last one would stay in memory

        left = until.left
        all_sent = all_sent or left == 0  # who was not asked in time is not asked any more
        for message_id in list(under_way):
            if message_id in waiting:
                if left > 0:
                    break
                continue
            yield from _emptied(under_way.pop(message_id))
        if waiting and left == 0:
            return
        if waiting and (all_sent or len(under_way) == window):
            time.sleep(min(pause, left))


def _emptied(replies: list[Message]) -> Iterator[Message]:
    """Hand on the items of a list, keeping none."""
    while replies:
        yield replies.pop(0)


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    *,
    until: Deadline,
    window: int | None = None,
    traffic: Traffic | None = None,
) -> list[Message]:
    """Send messages and collect what is answered in time; see `stream`."""
    return list(stream(grid, messages, until=until, window=window, traffic=traffic))


def failure(error: Error) -> str:
    """Name the kind of an error: "app", "crashed", "unavailable", "undelivered" or "unknown"."""
    return _FAILURES.get(error.code, "unknown")


def last_line(reply: Message) -> str:
    """Return what an error reply says, without the traceback before it."""
    lines = (reply.error.reason or "").strip().splitlines()
    return lines[-1] if lines else f"error {reply.error.code}"
