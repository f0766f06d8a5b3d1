"""What devices tell of themselves: asked in a round, kept between rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from logging import WARNING
from typing import Literal

from flwr.app import ArrayRecord, Message, Metadata, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from eclm_flower.adaptation.profile import DeviceProfile, Importance
from eclm_flower.errors import ReplyError
from eclm_flower.federation.exchange import Deadline, failure, last_line, stream
from eclm_flower.federation.messages import profile_from_content
from eclm_flower.federation.traffic import Traffic
from eclm_flower.modular.costs import CostTable

Tells = Literal["importance", "modules", "budget"]

# A request outlives its deadline a little: who is late is then silent and not an error.
TTL_MARGIN = 5.0  # seconds


class Profiles:
    """The latest profile of every device: its budget now, its importance while it is fresh.

    Parameters
    ----------
    importance_every : int, optional
        Ask for importance again after this many rounds; None: once.
    budget_every : int (default: 1)
        Ask for the budget again after this many rounds.
    tells : {"importance", "modules", "budget"}
        What a device tells: budget and importance; the modules that it chose itself with the
        selector; or its budget alone, and then it is never sent the selector.

    Attributes
    ----------
    latest : dict[int, DeviceProfile]
        By device number.
    budget_rounds, importance_rounds : dict[int, int]
        Device number -> the round in which each part was told.
    """

    def __init__(
        self,
        *,
        importance_every: int | None,
        budget_every: int = 1,
        tells: Tells = "importance",
    ) -> None:
        self.importance_every = importance_every
        self.budget_every = budget_every
        self.tells = tells
        self.latest: dict[int, DeviceProfile] = {}
        self.budget_rounds: dict[int, int] = {}
        self.importance_rounds: dict[int, int] = {}

    def start_anew(self) -> None:
        """Count rounds from 1 again: what was told in an earlier run was told before round 1."""
        self.budget_rounds.clear()
        self.importance_rounds = dict.fromkeys(self.importance_rounds, 0)

    def wants_selector(self, device: int, server_round: int) -> bool:
        """Whether what a device tells of its data is missing or old."""
        if self.tells == "budget":
            return False
        told = self.importance_rounds.get(device)
        if told is None:
            return True
        return self.importance_every is not None and server_round - told >= self.importance_every

    def update(
        self,
        grid: Grid,
        nodes: Mapping[int, int],
        server_round: int,
        question: Callable[[ArrayRecord | None], RecordDict],
        selector: ArrayRecord,
        *,
        everyones: Importance | None = None,
        until: Deadline,
        costs: CostTable,
        sub_tasks: int = 0,
        traffic: Traffic,
    ) -> Counter[str]:
        """Ask devices for their budget, and for their importance where it is missing or old.

        Parameters
        ----------
        grid : Grid
            Where the nodes are.
        nodes : dict[int, int]
            Device number -> node id of those to ask.
        server_round : int
            The round. Whose budget is fresh is not asked again.
        question : callable
            Selector arrays, or None where no importance is wanted -> what the query carries.
        selector : ArrayRecord
            The selector's arrays.
        everyones : dict[str, np.ndarray], optional
            Importance that all data has alike: nobody is asked to tell it.
        until, costs, sub_tasks, traffic
            See `ask`.

        Returns
        -------
        Counter
            Devices without a profile of this round, by reason.
        """
        if self.tells != "importance":
            everyones = None
        outdated = {
            device
            for device in nodes
            if everyones is None and self.wants_selector(device, server_round)
        }
        to_ask = {
            node: device
            for device, node in nodes.items()
            if self.of_round(device, server_round) is None or device in outdated
        }
        for device in to_ask.values():  # what was fresh until now counts only if it is told again
            self.budget_rounds.pop(device, None)
        answers, losses = ask(
            grid,
            list(to_ask),
            lambda node: question(selector if to_ask[node] in outdated else None),
            until=until,
            costs=costs,
            sub_tasks=sub_tasks,
            traffic=traffic,
        )
        for node, profile in answers.items():
            device = to_ask[node]
            if profile.device != device:
                log(WARNING, "Device %s now says it is device %s.", device, profile.device)
                losses.update(("refused", "refused-device"))
                continue
            if everyones is not None:
                profile = replace(profile, importance=everyones)
            elif device not in outdated and device in self.latest:
                profile = replace(profile, importance=self.latest[device].importance)
            if device in outdated:
                self.importance_rounds[device] = server_round
            if profile.infeasible:
                log(WARNING, "Device %s is left out: nothing fits its budget.", device)
                losses["infeasible"] += 1
                continue
            told = profile.selection if self.tells == "modules" else profile.importance
            if self.tells != "budget" and not told:
                log(WARNING, "Device %s did not tell its %s: left out.", device, self.tells)
                losses.update(("refused", f"refused-{self.tells}"))
                self.importance_rounds.pop(device, None)
                continue
            self.latest[device] = profile
            self.budget_rounds[device] = server_round
        if (
            self.tells == "modules"
        ):  # who lost its scores (a new SuperNode) is sent the selector again
            for node in to_ask.keys() - answers.keys():
                self.importance_rounds.pop(to_ask[node], None)
        return losses

    def of_round(self, device: int, server_round: int) -> DeviceProfile | None:
        """Return a device's profile if its budget is fresh: told in this round, or not long ago."""
        told = self.budget_rounds.get(device)
        fresh = told is not None and server_round - told < self.budget_every
        return self.latest[device] if fresh else None


def ask(
    grid: Grid,
    node_ids: Sequence[int],
    content: Callable[[int], RecordDict],
    *,
    until: Deadline,
    costs: CostTable | None = None,
    sub_tasks: int = 0,
    traffic: Traffic | None = None,
) -> tuple[dict[int, DeviceProfile], Counter[str]]:
    """Ask nodes for their profiles; those that fail to answer are left out, with a log line.

    Questions are made when they are sent, and answers read as they come: none is kept.

    Parameters
    ----------
    grid : Grid
        Where the nodes are.
    node_ids : sequence of int
        Whom to ask.
    content : callable
        Node id -> what the query carries.
    until : Deadline
        When to stop waiting.
    costs : CostTable, optional
        With it, importance that doesn't fit the model is refused.
    sub_tasks : int (default: 0)
        Number of sub-tasks with delta modules.
    traffic : Traffic, optional
        Counts the bytes.

    Returns
    -------
    dict[int, DeviceProfile]
        Node id -> profile, in the order of devices.
    Counter
        The others by reason, keyed as by `replies.Replies`.
    """
    asked: dict[str, int] = {}  # message id -> node id
    sent: list[Metadata] = []

    def questions() -> Iterator[Message]:
        for node_id in node_ids:
            ttl = until.left + TTL_MARGIN
            message = Message(content(node_id), node_id, "query", ttl=ttl)
            sent.append(message.metadata)
            yield message

    profiles: dict[int, DeviceProfile] = {}
    losses: Counter[str] = Counter()
    silent = dict.fromkeys(node_ids)
    for answer in stream(grid, questions(), until=until, traffic=traffic):
        # Flower has written the ids into the metadata of what was sent by now.
        asked.update((metadata.message_id, metadata.dst_node_id) for metadata in sent)
        sent.clear()
        node_id = asked.pop(answer.metadata.reply_to_message_id, None)
        if node_id is None:
            continue
        del silent[node_id]
        if answer.has_error():
            log(WARNING, "Node %s did not tell its profile: %s", node_id, last_line(answer))
            losses.update(("failed", f"failed-{failure(answer.error)}"))
            continue
        try:
            profiles[node_id] = profile_from_content(answer.content, costs, sub_tasks=sub_tasks)
        except ReplyError as error:
            log(WARNING, "Profile of node %s is refused: %s", node_id, error)
            losses.update(("refused", f"refused-{error.reason}"))
    for node_id in silent:
        log(WARNING, "Node %s did not tell its profile in time.", node_id)
        losses["silent"] += 1
    return dict(sorted(profiles.items(), key=lambda item: item[1].device)), losses
