"""Which devices there are, and whom a round asks: reproducible although node ids are random.

Flower draws node ids anew on every run and returns them as a set. Devices are therefore known by
the lasting number they report (their partition id), sorted by it, and drawn with a generator of
their own for every round and purpose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from logging import INFO, WARNING

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from eclm_flower.adaptation.profile import DeviceProfile
from eclm_flower.errors import ReplyError
from eclm_flower.federation.messages import profile_from_content
from eclm_flower.modular.costs import CostTable

TRAIN, EVALUATE = 0, 1  #: purposes of a draw
_POLL_SECONDS = 0.1
_RETRY_REFRESHES = 10  # a node that does not say who it is must not stall every round


class Roster:
    """The devices that answered, by their number.

    Parameters
    ----------
    seed : int
        Of the draws.
    query_config : ConfigRecord, optional
        Sent with the question who a new node is.

    Attributes
    ----------
    node_ids : dict[int, int]
        Device number -> node id of the devices connected at the last `refresh`.
    """

    def __init__(self, seed: int, query_config: ConfigRecord | None = None) -> None:
        self.seed = seed
        self.query_config = query_config or ConfigRecord()
        self.node_ids: dict[int, int] = {}
        self._refreshes = 0
        self._asked: dict[int, int] = {}  # node id -> the refresh in which it was asked

    def refresh(self, grid: Grid, *, at_least: int, timeout: float) -> None:
        """Wait for nodes to connect, and ask the new ones who they are.

        Parameters
        ----------
        grid : Grid
            Where the nodes are.
        at_least : int
            Nodes to wait for.
        timeout : float
            Seconds to wait for nodes, and for their answers.

        Raises
        ------
        TimeoutError
            Fewer than `at_least` nodes connected in time.
        """
        start = time.monotonic()
        told = False
        while len(connected := set(grid.get_node_ids())) < at_least:
            if time.monotonic() - start > timeout:
                raise TimeoutError(
                    f"Expected at least {at_least} nodes, but only {len(connected)} connected "
                    f"within {timeout:.0f} seconds; start more nodes, or ask for fewer."
                )
            if not told:
                log(INFO, "Waiting for %s nodes (%s connected)", at_least, len(connected))
                told = True
            time.sleep(_POLL_SECONDS)
        self.node_ids = {d: node for d, node in self.node_ids.items() if node in connected}
        self._refreshes += 1
        new = [
            node
            for node in sorted(connected - set(self.node_ids.values()))
            if self._refreshes - self._asked.get(node, -_RETRY_REFRESHES) >= _RETRY_REFRESHES
        ]
        self._asked.update(dict.fromkeys(new, self._refreshes))
        who = RecordDict({"config": self.query_config})
        answers = ask(grid, new, lambda _: who, timeout=timeout)
        for node_id, answer in answers.items():
            if answer.device in self.node_ids:
                log(
                    WARNING,
                    "Node %s says it is device %s, as another node does: left out. Give every node "
                    "a partition-id of its own.",
                    node_id,
                    answer.device,
                )
            else:
                self.node_ids[answer.device] = node_id

    def cohort(
        self,
        grid: Grid,
        *,
        fraction: float,
        least: int,
        available: int,
        server_round: int,
        purpose: int,
        timeout: float,
    ) -> list[int]:
        """Draw the devices of a round, as Flower's FedAvg counts them.

        Parameters
        ----------
        grid : Grid
            Where the nodes are.
        fraction, least : float, int
            Share of the devices to draw, and how many at the least.
        available : int
            Nodes to wait for.
        server_round, purpose : int
            What the draw is for: `TRAIN` or `EVALUATE` in a round.
        timeout : float
            Seconds to wait for nodes, and for their answers.
        """
        self.refresh(grid, at_least=max(available, least), timeout=timeout)
        number = max(int(len(self.node_ids) * fraction), least)
        return self.draw(number, server_round=server_round, purpose=purpose)

    def draw(self, number: int, *, server_round: int, purpose: int) -> list[int]:
        """Draw devices without replacement; the same for the same seed, round and purpose."""
        devices = sorted(self.node_ids)  # numbers can be node ids, too large for an array
        rng = np.random.default_rng([self.seed, server_round, purpose])
        drawn = rng.choice(len(devices), size=min(number, len(devices)), replace=False)
        return [devices[position] for position in sorted(drawn)]


def ask(
    grid: Grid,
    node_ids: Sequence[int],
    content: Callable[[int], RecordDict],
    *,
    timeout: float,
    costs: CostTable | None = None,
) -> dict[int, DeviceProfile]:
    """Ask nodes for their profiles; those that fail to answer are left out, with a log line.

    Parameters
    ----------
    grid : Grid
        Where the nodes are.
    node_ids : sequence of int
        Whom to ask.
    content : callable
        Node id -> what the query carries.
    timeout : float
        Seconds to wait.
    costs : CostTable, optional
        With it, importance that doesn't fit the model is refused.

    Returns
    -------
    dict[int, DeviceProfile]
        Node id -> profile.
    """
    messages = [Message(content(node_id), node_id, "query", ttl=timeout) for node_id in node_ids]
    if not messages:
        return {}
    profiles: dict[int, DeviceProfile] = {}
    replies = grid.send_and_receive(messages, timeout=timeout)
    asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    for answer in replies:
        node_id = asked.get(answer.metadata.reply_to_message_id)
        if node_id is None:
            continue
        if answer.has_error():
            log(WARNING, "Node %s did not tell its profile: %s", node_id, last_line(answer))
            continue
        try:
            profiles[node_id] = profile_from_content(answer.content, costs)
        except ReplyError as error:
            log(WARNING, "Node %s: %s", node_id, error)
    return dict(sorted(profiles.items(), key=lambda item: item[1].device))


def last_line(reply: Message) -> str:
    """Return what an error reply says, without the traceback before it."""
    lines = (reply.error.reason or "").strip().splitlines()
    return lines[-1] if lines else f"error {reply.error.code}"
