"""Which devices there are, and whom a round asks: reproducible although node ids are random.

Flower draws node ids anew on every run and returns them as a set. Devices are therefore known by
the lasting number they report (their partition id), sorted by it, and drawn with a generator of
their own for every round and purpose.
"""

from __future__ import annotations

import time
from logging import INFO, WARNING
from typing import NamedTuple

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from eclm_flower.adaptation.profile import Budget
from eclm_flower.federation.exchange import Deadline
from eclm_flower.federation.profiles import ask

TRAIN, EVALUATE = 0, 1  #: purposes of a draw
_POLL_SECONDS = 0.1
_LONGEST_PAUSE = 8  # greetings; a node that never says who it is must not stall every round


class _Missed(NamedTuple):
    times: int  # greetings in a row that a node did not answer
    next: int  # the greeting in which it is asked again


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
    greeting : dict[str, bool]
        Sent beside it.
    node_ids : dict[int, int]
        Device number -> node id of the devices connected at the last `greet`.
    budgets : dict[int, Budget]
        Device number -> the budget it told when it was greeted.
    """

    def __init__(self, seed: int, query_config: ConfigRecord | None = None) -> None:
        self.seed = seed
        self.query_config = query_config or ConfigRecord()
        self.greeting: dict[str, bool] = {}
        self.node_ids: dict[int, int] = {}
        self.budgets: dict[int, Budget] = {}
        self._greetings = 0
        self._missed: dict[int, _Missed] = {}  # node id -> what it did not answer
        self._claims: dict[int, int] = {}  # node id -> the device it says it is, as another does

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
        self.wait(grid, at_least=at_least, timeout=timeout)
        self.greet(grid, at_least=at_least, until=Deadline.after(timeout))

    def wait(self, grid: Grid, *, at_least: int, timeout: float) -> None:
        """Wait for nodes to connect; see `refresh`."""
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

    def greet(self, grid: Grid, *, at_least: int, until: Deadline) -> None:
        """Forget nodes that left, and ask new ones who they are.

        A node that does not answer is asked again after 1, 2, 4, ... greetings, so that one that
        never does stalls few rounds; in each while fewer than `at_least` devices are known.
        """
        connected = set(grid.get_node_ids())
        for device in [d for d, node in self.node_ids.items() if node not in connected]:
            del self.node_ids[device]
        self._claims = {node: d for node, d in self._claims.items() if node in connected}
        # Who left and comes back is asked at once, like anyone new.
        self._missed = {node: times for node, times in self._missed.items() if node in connected}
        self._greetings += 1
        connected.difference_update(self.node_ids.values(), self._claims)
        new = [
            node
            for node in sorted(connected)
            if len(self.node_ids) < at_least
            or node not in self._missed
            or self._greetings >= self._missed[node].next
        ]
        who = RecordDict({"config": ConfigRecord({**self.query_config, **self.greeting})})
        answers, _ = ask(grid, new, lambda _: who, until=until)
        for node_id in new:
            if node_id in answers:
                self._missed.pop(node_id, None)
                continue
            times = 1 + (self._missed[node_id].times if node_id in self._missed else 0)
            pause = min(2 ** (times - 1), _LONGEST_PAUSE)
            self._missed[node_id] = _Missed(times, self._greetings + pause)
        for node_id, answer in answers.items():
            self._claims[node_id] = answer.device
            self.budgets[answer.device] = answer.budget
        # A device that comes back under a new node id waits until the engine has noticed that the
        # old node is gone: of two nodes that are the same device, the first one counts.
        for node_id, device in list(self._claims.items()):
            if device not in self.node_ids:
                self.node_ids[device] = node_id
                del self._claims[node_id]
            elif node_id in answers:
                log(
                    WARNING,
                    "Node %s says it is device %s, as another node does: left out while that one "
                    "is connected. Give every node a partition-id of its own.",
                    node_id,
                    device,
                )

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
        return self.sample(
            fraction=fraction, least=least, server_round=server_round, purpose=purpose
        )

    def sample(self, *, fraction: float, least: int, server_round: int, purpose: int) -> list[int]:
        """Draw a share of the devices there are; see `cohort`."""
        number = max(int(len(self.node_ids) * fraction), least)
        return self.draw(number, server_round=server_round, purpose=purpose)

    def draw(self, number: int, *, server_round: int, purpose: int) -> list[int]:
        """Draw devices without replacement; the same for the same seed, round and purpose."""
        devices = sorted(self.node_ids)  # numbers can be node ids, too large for an array
        rng = np.random.default_rng([self.seed, server_round, purpose])
        drawn = rng.choice(len(devices), size=min(number, len(devices)), replace=False)
        return [devices[position] for position in sorted(drawn)]
