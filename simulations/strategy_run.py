"""One strategy on one seed, through all adaptation steps.

::

    for every step:
        data shifts
        devices come back for a model and are evaluated
        rounds: some devices receive, train and return; the cloud merges
        devices are handed a model, adapt it to their data, and are evaluated

Flower's `Strategy.start` neither evaluates devices before the first round nor skips evaluations,
so its loop stands here.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import TensorDataset

from eclm_flower import ECLM
from eclm_flower.federation import Roster, Traffic
from eclm_flower.federation.exchange import Deadline, exchange
from eclm_flower.modular import ModularModel
from eclm_flower.prototyping import accuracy
from simulations.clock import seconds_of_round, seconds_of_work
from simulations.compute import moved
from simulations.conditions import Conditions
from simulations.evaluated import SteadyRoster
from simulations.living_grid import LivingGrid, Loss, nothing_happens
from simulations.plan import Plan, local_epochs, plan_of
from simulations.results import Row
from simulations.settings import Settings
from simulations.world import World
from strategies.method import Method

_TIMEOUT = 24 * 3600.0  # seconds; simulated devices always answer
_OUT_WIDTH = 256  # so that bytes don't depend on where a run writes


class DeviceFailedError(RuntimeError):
    """A simulated device raised: the run ends; strategies that were done stay written."""


class StrategyRun:
    """One strategy on one seed.

    Parameters
    ----------
    settings : Settings
        The experiment.
    world : World
        The seed.
    method : Method
        The strategy.
    model : ModularModel
        As the offline stage left it for this kind of method.
    grid : LivingGrid
        With a node for every device.
    roster : Roster
        That knows them all.
    cloud_test : TensorDataset
        What the whole cloud model is judged by.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        world: World,
        method: Method,
        model: ModularModel,
        grid: LivingGrid,
        roster: Roster,
        cloud_test: TensorDataset,
    ) -> None:
        self._settings, self._world, self._method, self._grid = settings, world, method, grid
        self._whole = copy.deepcopy(model.body).to(settings.compute)
        self._cloud_test = moved(cloud_test, settings.compute)
        self._device_of = {node: device for device, node in roster.node_ids.items()}
        self._plan: Plan = plan_of(method, settings.variant)
        self._config = run_config(settings, world.seed, method.name)
        # The strategy sends this very record with its queries: what changes here, changes there.
        self._query_config = run_config(settings, world.seed, method.name)
        evaluated = settings.evaluated or settings.devices
        self._strategy = method.strategy(
            model,
            seed=world.seed,
            query_config=self._query_config,
            fraction_train=settings.per_round / settings.devices,
            fraction_evaluate=evaluated / settings.devices,
            min_train_nodes=settings.per_round,
            min_evaluate_nodes=evaluated,
            min_available_nodes=settings.devices,
        )
        if settings.evaluated:
            self._strategy.roster = SteadyRoster(world.seed, self._query_config)  # type: ignore[attr-defined]
        self._evaluated: list[int] = []  # node ids
        if isinstance(self._strategy, ECLM):
            self._strategy.round_timeout = _TIMEOUT  # its messages expire with its rounds
        self._arrays: ArrayRecord = method.arrays(model)
        self._clock = 0.0
        self._spent: dict[int, Traffic] = defaultdict(Traffic)  # device -> since its last row
        self._after_shift: dict[int, dict[str, float]] = {}  # device -> what it had is worth then
        self._rows: list[Row] = []

    def rows(self, console: Console) -> list[Row]:
        """Run it all; returns a row for every evaluated device."""
        settings = self._settings
        rounds = settings.rounds if self._plan.rounds else 0
        self._grid.reset()
        with Progress(console=console) as progress:
            bar = progress.add_task(self._method.name, total=settings.steps * max(rounds, 1))
            for step in range(settings.steps):
                if step > 0 and settings.phase(step) > settings.phase(step - 1):
                    self._data_has_shifted()
                for number in range(rounds + 1):
                    last = number == rounds
                    # Without rounds a step has one evaluation, where the others have their last.
                    of_step = settings.rounds if last else number
                    self._set_time(step, of_step)
                    if number > 0:
                        self._round(step)
                    if last or number % settings.evaluate_every == 0:
                        self._evaluate(step, of_step, delivery=last)
                        progress.update(bar, description=self._described())
                    progress.advance(bar, int(number > 0 or rounds == 0))
        return self._rows

    def _set_time(self, step: int, of_step: int) -> None:
        self._moment = step * (self._settings.rounds + 1) + of_step
        for config in (self._config, self._query_config):
            config["step"], config["moment"] = step, self._moment

    def _data_has_shifted(self) -> None:
        """Let the strategy ask again what matters to a device's data, if it ever does."""
        profiles = getattr(self._strategy, "told", None)
        if profiles is not None:
            profiles.importance_rounds.clear()

    # Rounds

    def _round(self, step: int) -> None:
        """Let some devices train, merge what returns, and let the clock tick."""
        self._grid.fate = self._fate
        self._purpose(local=True, keeps=False, delivery=True)
        requests = list(
            self._strategy.configure_train(self._moment, self._arrays, self._config, self._grid)
        )
        replies = self._exchanged(requests)
        merged, _ = self._strategy.aggregate_train(self._moment, replies)
        self._arrays = merged or self._arrays
        self._grid.fate = nothing_happens
        self._tick(step, requests, replies)

    def _fate(self, node: int, kind: str) -> Loss | None:
        device = self._device_of[node]
        now = self._conditions(device)
        if not now.online:
            return "offline"
        return None if now.returns or kind != MessageType.TRAIN else "dropped out"

    def _conditions(self, device: int) -> Conditions:
        return self._world.conditions(
            device,
            self._moment,
            availability=self._settings.availability,
            dropout=self._settings.dropout,
        )

    def _tick(self, step: int, requests: Sequence[Message], replies: Sequence[Message]) -> None:
        """Advance the clock by what the devices asked needed, and note the bytes of each."""
        came = {reply.metadata.reply_to_message_id for reply in replies if reply.has_content()}
        returned: list[float] = []
        lost: list[float] = []
        for request in requests:
            node = request.metadata.dst_node_id
            device = self._device_of[node]
            now = self._conditions(device)
            if not now.online:
                continue  # the cloud knows at once
            query, train = (self._grid.traffic[kind][node] for kind in ("query", "train"))
            back = request.metadata.message_id in came
            held = self._method.modules(request, self._world.model)
            seconds = seconds_of_work(
                self._world.fleet[device],
                now,
                flops=self._world.model.costs.of(held).computation_flops,
                samples=len(self._world.data(device, step).train),
                epochs=local_epochs(self._method, self._settings),
                bytes_down=query.down + train.down,
                # As much returns as was sent, if it returns.
                bytes_up=query.up + (train.up if back else train.down),
            )
            (returned if back else lost).append(seconds)
        self._clock += seconds_of_round(returned, lost)
        self._note_bytes()

    def _note_bytes(self) -> None:
        for kind in (MessageType.QUERY, MessageType.TRAIN):
            for node, traffic in self._grid.traffic[kind].items():
                spent = self._spent[self._device_of[node]]
                spent.down += traffic.down
                spent.up += traffic.up
        self._grid.reset()

    # Evaluations

    def _evaluate(self, step: int, of_step: int, *, delivery: bool) -> None:
        """Evaluate devices: with a model from the cloud, or with the one they keep."""
        keeps = not self._plan.returns and self._settings.steps > 1
        self._purpose(local=self._plan.local, keeps=keeps, delivery=delivery)
        if self._plan.returns or step == 0:
            requests = list(
                self._strategy.configure_evaluate(
                    self._moment, self._arrays, self._config, self._grid
                )
            )
            self._evaluated = sorted(message.metadata.dst_node_id for message in requests)
        else:
            content = RecordDict({"config": self._config})
            requests = [Message(content, node, MessageType.EVALUATE) for node in self._evaluated]
        replies = self._exchanged(requests)
        expected = self._settings.evaluated or self._settings.devices
        if len(replies) < expected:
            raise DeviceFailedError(f"Expected {expected} devices to answer, got {len(replies)}.")
        sent = {n: traffic.down for n, traffic in self._grid.traffic[MessageType.EVALUATE].items()}
        if not requests[0].content.array_records:
            sent = {}
        self._note_bytes()
        whole = self._whole_accuracy()
        answers = {
            self._device_of[reply.metadata.src_node_id]: (reply.metadata.src_node_id, metrics)
            for reply in replies
            for metrics in reply.content.metric_records.values()
        }
        for device, (node, metrics) in sorted(answers.items()):
            self._rows.append(
                Row(
                    strategy=self._method.name,
                    seed=self._world.seed,
                    step=step,
                    round=step * self._settings.rounds + of_step,
                    device=device,
                    accuracy_before=_number(metrics, "accuracy-before"),
                    accuracy_after=_number(metrics, "accuracy-after"),
                    masked_before=_number(metrics, "masked-before"),
                    masked_after=_number(metrics, "masked-after"),
                    **self._after_shift.pop(device, {}),
                    accuracy_global=whole,
                    bytes_down=self._spent[device].down,
                    bytes_up=self._spent[device].up,
                    bytes_delivered=sent.get(node, 0) if delivery else 0,
                    modules=int(_number(metrics, "modules")),
                    memory=_number(metrics, "memory"),
                    seconds=_number(metrics, "seconds"),
                    clock=self._clock,
                )
            )
            self._after_shift[device] = {
                "accuracy_held": _number(metrics, "accuracy-held"),
                "accuracy_fallback": _number(metrics, "accuracy-fallback"),
            }
            del self._spent[device]
        for device, spent in sorted(self._spent.items()):
            if spent.down or spent.up:  # no byte may be lost with who is not evaluated
                self._rows.append(self._unevaluated(device, step, of_step))
        self._spent.clear()

    def _unevaluated(self, device: int, step: int, of_step: int) -> Row:
        """Row of a device that spent bytes since its last row, and is not evaluated."""
        return Row(
            strategy=self._method.name,
            seed=self._world.seed,
            step=step,
            round=step * self._settings.rounds + of_step,
            device=device,
            bytes_down=self._spent[device].down,
            bytes_up=self._spent[device].up,
            clock=self._clock,
        )

    def _whole_accuracy(self) -> float:
        state = self._method.body(self._arrays)
        if state is None:
            return math.nan
        self._whole.load_state_dict(state)
        return accuracy(self._whole, self._cloud_test)

    # Messages

    def _purpose(self, *, local: bool, keeps: bool, delivery: bool) -> None:
        """Tell devices what they are asked for."""
        for config in (self._config, self._query_config):
            config["local"], config["keeps"], config["delivery"] = local, keeps, delivery

    def _exchanged(self, requests: Sequence[Message]) -> list[Message]:
        """Exchange messages; what the world loses is no failure, anything else is."""
        replies = exchange(self._grid, requests, until=Deadline.after(_TIMEOUT))
        for reply in replies:
            if reply.has_error() and not self._grid.lost(reply):
                raise DeviceFailedError(f"A device failed: {reply.error.reason}")
        return replies

    def _described(self) -> str:
        latest = [row for row in self._rows if row.round == self._rows[-1].round]
        known = [row.accuracy_before for row in latest if row.evaluated]
        mean = sum(known) / len(known)
        return f"{self._method.name} (accuracy {mean:.1%})"


def run_config(settings: Settings, seed: int, strategy: str) -> ConfigRecord:
    """Everything a device must know of an experiment, at its beginning."""
    return ConfigRecord(
        {
            "settings": settings.with_rate_of(strategy).for_devices().to_json(),
            "seed": seed,
            "strategy": strategy,
            "out": settings.out.ljust(_OUT_WIDTH),
            "step": 0,
            "moment": 0,
            "local": True,
            "keeps": False,
            "delivery": False,
        }
    )


def _number(metrics: MetricRecord, name: str) -> float:
    return float(metrics[name])  # type: ignore[arg-type]
