"""ECLM as a Flower strategy: derive a sub-model per device, merge what returns (section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from eclm_flower.adaptation.derivation import derive
from eclm_flower.adaptation.merge import Weighting, merge
from eclm_flower.adaptation.profile import DeviceProfile
from eclm_flower.errors import InfeasibleBudgetError, ReplyError, RequestError
from eclm_flower.federation.messages import (
    BATCH_NORM,
    BODY,
    SELECTOR,
    selection_to_config,
    to_array,
    to_tensors,
)
from eclm_flower.federation.replies import Request, match, read_update
from eclm_flower.federation.roster import EVALUATE, TRAIN, Roster, ask
from eclm_flower.modular.batch_norm import BatchNormPolicy
from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.selection import Selection, count


class ECLM(FedAvg):
    """Edge-cloud collaborative learning (ECLM, arXiv 2311.11083; Nebula, ICPP 2024).

    In a round, sampled devices report their budget and, once, which modules matter for their data;
    each gets the sub-model that `derive` chooses, trains it, and what returns is merged module by
    module. A device that fails, or answers what can't be merged, is left out of the round.

    Parameters
    ----------
    model : ModularModel
        The modularised cloud model. Its structure, costs and selector settings are used; its
        weights travel as ``initial_arrays=ArrayRecord(model.state_dict())``.
    seed : int (default: 0)
        Of the draws of devices.
    weighting : {"importance-examples", "importance", "examples"}
        What a returned module is weighed by; the paper's is "importance". In our trials they gave
        the same accuracy; the default also makes FedAvg the special case of one module a layer.
    batch_norm : {"frozen", "merged"}
        See `eclm_flower.modular.batch_norm`.
    importance_every : int, optional
        Ask a device for its importance again after this many rounds, at the price of the
        selector's bytes; None (default) asks once. The budget is asked in every round.
    query_config : ConfigRecord, optional
        Sent with every query, as Flower's ``train_config`` is with every training request.
    **fedavg
        Every parameter of Flower's `FedAvg`: fractions and minimum numbers of nodes, record keys,
        aggregation of metrics.

    Attributes
    ----------
    profiles : dict[int, DeviceProfile]
        Device number -> its latest profile.
    selections : dict[int, Selection]
        Device number -> the modules of the sub-model it was last sent.
    """

    def __init__(
        self,
        model: ModularModel,
        *,
        seed: int = 0,
        weighting: Weighting = "importance-examples",
        batch_norm: BatchNormPolicy = "frozen",
        importance_every: int | None = None,
        query_config: ConfigRecord | None = None,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        if importance_every is not None and importance_every < 1:
            raise ValueError(f"Expected importance_every >= 1 or None, got {importance_every}.")
        self.model = model
        self.weighting = weighting
        self.batch_norm = batch_norm
        self.importance_every = importance_every
        self.query_config = query_config or ConfigRecord()
        self.roster = Roster(seed, self.query_config)
        self.profiles: dict[int, DeviceProfile] = {}
        self.selections: dict[int, Selection] = {}
        self._timeout = 3600.0
        self._budget_round: dict[int, int] = {}  # device -> round of its latest budget
        self._importance_round: dict[int, int] = {}  # device -> round of its latest importance
        self._requests: list[Request] = []
        # The cloud model as `start` handed it to this round; `start` owns it between rounds.
        self._arrays = ArrayRecord()
        self._state: dict[str, Tensor] = {}

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        *args: Any,
        **kwargs: Any,
    ) -> Result:
        """Run the federation; see Flower's `Strategy.start`. Queries share the timeout."""
        self._timeout = timeout
        return super().start(grid, initial_arrays, num_rounds, timeout, *args, **kwargs)

    def summary(self) -> None:
        """Log the cloud model, its costs and the settings."""
        costs = self.model.costs
        log(INFO, "\t├──> Cloud model: %s module layers", len(costs.modules))
        for name, number in costs.modules.items():
            each = costs.per_module[name]
            log(
                INFO,
                "\t│\t├── %s: %s modules of %.1f kB, %.2f MFLOP a training sample",
                name,
                number,
                each.communication_bytes / 1e3,
                each.computation_flops / 1e6,
            )
        log(
            INFO,
            "\t│\t└── shared part: %.1f kB; whole model: %.1f kB",
            costs.shared.communication_bytes / 1e3,
            costs.whole.communication_bytes / 1e3,
        )
        log(
            INFO,
            "\t├──> ECLM: weighting %s | batch norm %s | gating %s",
            self.weighting,
            self.batch_norm,
            self.model.gating,
        )
        super().summary()

    # ---------------------------------------------------------------- derive

    def derive(self, profile: DeviceProfile) -> Selection:
        """Choose the modules of a device's sub-model; override to choose otherwise.

        Raises
        ------
        InfeasibleBudgetError
            Nothing fits the device's budget: it is left out of the round.
        """
        return derive(profile.importance, self.model.costs, profile.budget)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw devices, ask their profiles, and send each its sub-model."""
        if self.fraction_train == 0.0:
            return []
        devices = self._draw(
            server_round, grid, TRAIN, fraction=self.fraction_train, least=self.min_train_nodes
        )
        return self._requests_to(
            devices, server_round, arrays, config, grid, message_type=MessageType.TRAIN
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw devices and send each its own sub-model to evaluate."""
        if self.fraction_evaluate == 0.0:
            return []
        devices = self._draw(
            server_round,
            grid,
            EVALUATE,
            fraction=self.fraction_evaluate,
            least=self.min_evaluate_nodes,
        )
        return self._requests_to(
            devices, server_round, arrays, config, grid, message_type=MessageType.EVALUATE
        )

    def _draw(
        self, server_round: int, grid: Grid, purpose: int, *, fraction: float, least: int
    ) -> list[int]:
        return self.roster.cohort(
            grid,
            fraction=fraction,
            least=least,
            available=self.min_available_nodes,
            server_round=server_round,
            purpose=purpose,
            timeout=self._timeout,
        )

    def _requests_to(
        self,
        devices: list[int],
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        *,
        message_type: str,
    ) -> list[Message]:
        """Derive every device's sub-model and pack it; a record of its own for each."""
        self._take_over(arrays)
        self._update_profiles(devices, server_round, grid)
        config["server-round"] = server_round
        messages = []
        self._requests = []
        for device in devices:
            profile = self.profiles.get(device)
            if profile is None or self._budget_round[device] != server_round:
                continue  # it did not answer; `ask` said why
            try:
                selection = self.derive(profile)
            except InfeasibleBudgetError as error:
                log(WARNING, "Device %s is left out: %s", device, error)
                continue
            plugin = {**selection_to_config(selection), BATCH_NORM: self.batch_norm}
            content = RecordDict(
                {
                    self.arrayrecord_key: self._pack(selection),
                    self.configrecord_key: ConfigRecord({**config, **plugin}),
                }
            )
            # A message that outlives its round would keep a straggler busy with old work.
            message = Message(
                content, self.roster.node_ids[device], message_type, ttl=self._timeout
            )
            messages.append(message)
            self._requests.append(Request(message.metadata, device, selection))
            self.selections[device] = selection
        log(
            INFO,
            "configure_%s: %s of %s devices get a sub-model, of %.0f modules on average",
            message_type,
            len(messages),
            len(self.roster.node_ids),
            np.mean([count(request.selection) for request in self._requests] or [0]),
        )
        return messages

    def _take_over(self, arrays: ArrayRecord) -> None:
        """Make `arrays` this round's cloud model."""
        if arrays is self._arrays:
            return
        expected = self.model.state_dict().keys()
        if arrays.keys() != expected:
            raise RequestError(
                "Expected the arrays of the modular model, "
                "initial_arrays=ArrayRecord(model.state_dict()); differing keys: "
                f"{sorted(arrays.keys() ^ expected)[:4]}."
            )
        self._arrays = arrays
        self._state = to_tensors(arrays, BODY)

    def _update_profiles(self, devices: list[int], server_round: int, grid: Grid) -> None:
        """Ask devices for their budget, and for their importance where it is missing or old."""
        outdated = {
            device
            for device in devices
            if device not in self._importance_round
            or (
                self.importance_every is not None
                and server_round - self._importance_round[device] >= self.importance_every
            )
        }
        selector = ArrayRecord(
            {key: array for key, array in self._arrays.items() if key.startswith(SELECTOR)}
        )
        device_at = {self.roster.node_ids[device]: device for device in devices}

        def content(node_id: int) -> RecordDict:
            question = RecordDict({self.configrecord_key: self.query_config})
            if device_at[node_id] in outdated:
                question[self.arrayrecord_key] = selector
            return question

        to_ask = [
            self.roster.node_ids[device]
            for device in devices
            if self._budget_round.get(device) != server_round or device in outdated
        ]
        answers = ask(grid, to_ask, content, timeout=self._timeout, costs=self.model.costs)
        for node_id, profile in answers.items():
            device = device_at[node_id]
            if profile.importance:
                self._importance_round[device] = server_round
            elif device in self.profiles:
                profile = replace(profile, importance=self.profiles[device].importance)
            if not profile.importance:
                log(WARNING, "Device %s did not report its importance: left out.", device)
                continue
            self.profiles[device] = profile
            self._budget_round[device] = server_round

    def _pack(self, selection: Selection) -> ArrayRecord:
        """Pack a sub-model's arrays; those of the shared part are the cloud's own, not copies."""
        chosen: dict[str, Array] = {
            f"{BODY}{key}": to_array(layer.take(key, self._state[key], selection[layer.name]))
            for layer in self.model.layers.values()
            for key in layer.axes
        }
        gated = self.model.gating == "selector"
        packed = ArrayRecord()
        for key, array in self._arrays.items():
            in_body = key.startswith(BODY)
            floating = not in_body or self._state[key.removeprefix(BODY)].is_floating_point()
            if (gated or in_body) and floating:
                packed[key] = chosen.get(key, array)  # set one by one: the constructor copies
        return packed

    # ----------------------------------------------------------------- merge

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what returned, module by module; refuse what is broken."""
        valid, counts = match(replies, self._requests, self.weighted_by_key)
        layers = self.model.layers.values()
        updates, contents = [], []
        for request, content in valid:
            try:
                update = read_update(
                    request,
                    content,
                    importance=self.profiles[request.device].importance,
                    state=self._state,
                    layers=layers,
                    arrayrecord_key=self.arrayrecord_key,
                    weighted_by_key=self.weighted_by_key,
                )
            except ReplyError as error:
                log(WARNING, "Reply of device %s is refused: %s", request.device, error)
                counts["refused"] += 1
            else:
                updates.append(update)
                contents.append(content)
        if not updates:
            return None, MetricRecord(self._round_metrics(counts, 0, 0))

        merged = merge(self._state, updates, layers, weighting=self.weighting)
        changed = {
            f"{BODY}{key}": tensor
            for key, tensor in merged.items()
            if tensor is not self._state[key]
        }
        arrays = ArrayRecord(
            {
                key: to_array(changed[key]) if key in changed else array
                for key, array in self._arrays.items()
            }
        )
        updated = sum(
            len(set().union(*(update.selection[layer.name] for update in updates)))
            for layer in layers
        )
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        metrics.update(self._round_metrics(counts, len(updates), updated))
        return arrays, metrics

    def _round_metrics(
        self, counts: Mapping[str, int], merged: int, updated: int
    ) -> dict[str, int | float | list[int] | list[float]]:
        log(
            INFO,
            "aggregate_train: %s asked, %s merged, %s refused, %s failed, %s silent; "
            "%s of %s modules updated",
            len(self._requests),
            merged,
            counts["refused"],
            counts["failed"],
            counts["silent"],
            updated,
            sum(self.model.costs.modules.values()),
        )
        return {
            "eclm-asked": len(self._requests),
            "eclm-merged": merged,
            "eclm-refused": counts["refused"],
            "eclm-failed": counts["failed"],
            "eclm-silent": counts["silent"],
            "eclm-modules-updated": updated,
        }

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the metrics of devices, each evaluated on its own sub-model."""
        valid, _ = match(replies, self._requests, self.weighted_by_key)
        if not valid:
            return None
        contents = [content for _, content in valid]
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key)
