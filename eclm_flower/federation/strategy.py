"""ECLM as a Flower strategy: derive a sub-model per device, merge what returns (section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from logging import WARNING
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from eclm_flower.adaptation.delta_merge import DeltaMean
from eclm_flower.adaptation.derivation import derive, derive_all
from eclm_flower.adaptation.merge import Weighting, merge
from eclm_flower.adaptation.outliers import Limits
from eclm_flower.adaptation.profile import DeviceProfile
from eclm_flower.adaptation.robust import Robust
from eclm_flower.adaptation.sub_tasks import mixture_from_importance
from eclm_flower.adaptation.update import Update
from eclm_flower.errors import InfeasibleBudgetError
from eclm_flower.federation.checkpoint import CheckpointFolder
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.messages import DERIVES, DTYPES
from eclm_flower.federation.phase import Phase
from eclm_flower.federation.profiles import Profiles, Tells
from eclm_flower.federation.replies import Request, Training, read_evaluation
from eclm_flower.federation.requests import configure
from eclm_flower.federation.roster import Roster
from eclm_flower.federation.rounds import run_rounds
from eclm_flower.federation.run_state import RunState
from eclm_flower.federation.summary import log_summary
from eclm_flower.federation.wire import bytes_per_value
from eclm_flower.federation.wrapping import refuse_workflow, refuse_wrappers
from eclm_flower.modular.batch_norm import BatchNormPolicy
from eclm_flower.modular.costs import CostTable
from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.selector import DELTAS

_REMEMBERED = 64  # updates whose norms say what is usual

# The attributes that a run's numbers depend on.
_SETTINGS = (
    "weighting",
    "batch_norm",
    "importance_every",
    "budget_every",
    "derive_on",
    "robust",
    "limits",
    "min_replies",
    "delta_step",
    "download_dtype",
    "upload_dtype",
    "fraction_train",
    "fraction_evaluate",
    "min_train_nodes",
    "min_evaluate_nodes",
    "weighted_by_key",
)


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
        selector's bytes; None (default) asks once. Nobody is asked where the selector's gates are
        alike for every input: in a nested order without delta modules, and before `prototype`.
    budget_every : int (default: 1)
        Ask a device for its budget again after this many rounds. 1 asks in every round, an exchange
        before the training; with more, a round whose devices all told theirs lately has none.
    derive_on : {"cloud", "device"}
        Who derives a device's sub-model. ``"device"``: it gets selector and costs and tells the
        modules it chose; its importance and budget never leave it, so modules are merged by number
        of examples. The same budget gives the same modules either way.
    robust : Robust, optional
        How to merge when some devices may lie; see `eclm_flower.adaptation.robust`.
    limits : Limits, optional
        How far from its peers a reply may be; what is farther is refused. Default: ``Limits()``.
    query_config : ConfigRecord, optional
        Sent with every query, as Flower's ``train_config`` is with every training request.
    round_timeout : float, optional
        Seconds after which the training of a round ends with what came, queries included; the
        evaluation of a round likewise. Default: the ``timeout`` of `start`.
    min_replies : int (default: 1)
        Replies a round needs: with fewer that can be used it changes nothing.
    window : int, optional
        Most messages under way: sent, and the reply not yet merged. It bounds the server's memory
        where the engine keeps messages in it, as a simulation does: about twice the clients that
        run at a time keep all of them busy. None (default): all of a round, as Flower does; real
        devices work side by side, and one that is slow holds up no other.
    delta_step : float (default: 1.0)
        How far delta modules follow what the devices of their sub-tasks change; see
        `eclm_flower.adaptation.delta_merge`. 0: they stay as the offline stage left them, as they
        do under `robust`. Without delta modules it means nothing.
    download_dtype : {torch.float16, torch.bfloat16}, optional
        Send sub-models rounded to it: half the bytes, and budgets pay for more modules. None
        (default): as they are.
    upload_dtype : {torch.float16, torch.bfloat16, torch.int8}, optional
        Devices return what changed, rounded to it; with `ErrorFeedback` on a device what that loses
        is made up for later. None (default): the sub-model, as it is.
    checkpoint_dir : path, optional
        Folder for checkpoints. If there is one in it, `start` goes on from there.
    checkpoint_every : int (default: 1)
        Write one after every so many rounds, and after the last.
    **fedavg
        Every parameter of Flower's `FedAvg`: fractions and minimum numbers of nodes, record keys,
        aggregation of metrics.

    Attributes
    ----------
    profiles : dict[int, DeviceProfile]
        Device number -> its latest profile.
    selections : dict[int, Selection]
        Device number -> the modules of the sub-model it was last sent.
    state : dict[str, Tensor]
        The cloud model's body in this round, as devices got it; to be read by `merge`.
    reply_metrics : dict[int, MetricRecord]
        Device number -> the metrics of its reply, of the updates that `merge` has got so far.
    usual : list of (float, float)
        Norm and number of examples of updates lately merged: what `limits` are multiples of.
    uses_importance : bool
        Of the class. False in a subclass whose `derive` and `merge` need no importance: devices
        are then never sent the selector, profiles have none, and `merge` weighs by examples.
    """

    uses_importance: bool = True

    def __init__(
        self,
        model: ModularModel,
        *,
        seed: int = 0,
        weighting: Weighting = "importance-examples",
        batch_norm: BatchNormPolicy = "frozen",
        importance_every: int | None = None,
        budget_every: int = 1,
        derive_on: Literal["cloud", "device"] = "cloud",
        robust: Robust | None = None,
        limits: Limits | None = None,
        query_config: ConfigRecord | None = None,
        round_timeout: float | None = None,
        min_replies: int = 1,
        window: int | None = None,
        delta_step: float = 1.0,
        download_dtype: torch.dtype | None = None,
        upload_dtype: torch.dtype | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 1,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        for name, given, known in (
            ("weighting", weighting, get_args(Weighting)),
            ("batch_norm", batch_norm, get_args(BatchNormPolicy)),
            ("derive_on", derive_on, ("cloud", "device")),
        ):
            if given not in known:
                raise ValueError(f"Expected {name} from {', '.join(known)}, got {given!r}.")
        if importance_every is not None and importance_every < 1:
            raise ValueError(f"Expected importance_every >= 1 or None, got {importance_every}.")
        if budget_every < 1:
            raise ValueError(f"Expected budget_every >= 1, got {budget_every}.")
        if round_timeout is not None and not round_timeout > 0:
            raise ValueError(f"Expected round_timeout > 0 seconds or None, got {round_timeout}.")
        if min_replies < 1:
            raise ValueError(f"Expected min_replies >= 1, got {min_replies}.")
        if window is not None and window < 1:
            raise ValueError(f"Expected window >= 1 or None, got {window}.")
        if not delta_step >= 0:
            raise ValueError(f"Expected delta_step >= 0, got {delta_step}.")
        if download_dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(
                f"Expected download_dtype float16, bfloat16 or None, got {download_dtype}."
            )
        if upload_dtype not in (None, *DTYPES.values()):
            raise ValueError(
                f"Expected upload_dtype float16, bfloat16, int8 or None, got {upload_dtype}."
            )
        self.model = model
        self.weighting = weighting
        self.batch_norm = batch_norm
        self.importance_every = importance_every
        self.budget_every = budget_every
        self.derive_on = derive_on
        self.robust = robust
        self.limits = limits or Limits()
        self.query_config = query_config or ConfigRecord()
        self.round_timeout = round_timeout
        self.min_replies = min_replies
        self.window = window
        self.delta_step = delta_step
        self.download_dtype, self.upload_dtype = download_dtype, upload_dtype
        self.checkpoints = (
            None
            if checkpoint_dir is None
            else CheckpointFolder(checkpoint_dir, every=checkpoint_every)
        )
        self.roster = Roster(seed, self.query_config)
        if derive_on == "device":
            self.roster.greeting[DERIVES] = True
        tells: Tells = "importance" if self.uses_importance else "budget"
        self.told = Profiles(
            importance_every=importance_every,
            budget_every=budget_every,
            tells="modules" if derive_on == "device" else tells,
        )
        self.selections: dict[int, Selection] = {}
        self.usual: list[tuple[float, float]] = []  # norm and examples of updates lately merged
        self.reply_metrics: dict[int, MetricRecord] = {}
        self.timeout = 3600.0  # seconds; `start` sets it
        self.phase = Phase.that_asks_nobody()  # the training or evaluation that is going on
        self._cloud: CloudModel | None = None
        self._merged: CloudModel | None = None  # what `aggregate_train` made of it

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation, as Flower's `Strategy.start`, or go on from a checkpoint.

        Parameters
        ----------
        grid : Grid
            Where the nodes are.
        initial_arrays : ArrayRecord
            ``ArrayRecord(model.state_dict())``; not used if there is a checkpoint to go on from.
        num_rounds : int (default: 3)
            Rounds to run, those before a checkpoint included.
        timeout : float (default: 3600)
            Seconds to wait for enough nodes to connect; and `round_timeout`, if that is not given.
        train_config, evaluate_config, evaluate_fn
            As in Flower.

        Raises
        ------
        CheckpointError
            The checkpoint in ``checkpoint_dir`` is damaged, or of another run.
        TimeoutError
            Fewer than ``min_available_nodes`` nodes connected in time.
        """
        self.timeout = timeout
        return run_rounds(
            self,
            grid,
            initial_arrays,
            num_rounds=num_rounds,
            train_config=ConfigRecord() if train_config is None else train_config,
            evaluate_config=ConfigRecord() if evaluate_config is None else evaluate_config,
            evaluate_fn=evaluate_fn,
        )

    def summary(self) -> None:
        """Log the cloud model, its costs and the settings."""
        log_summary(self)
        super().summary()

    def settings(self) -> dict[str, str]:
        """Name what a run's numbers depend on, beside model and data.

        A run goes on only from a checkpoint of the same. Extend it in a subclass that has
        parameters of its own.
        """
        return {
            "strategy": type(self).__qualname__,
            "seed": str(self.seed),
            **{name: str(getattr(self, name)) for name in _SETTINGS},
        }

    @property
    def seed(self) -> int:
        """Of the draws of devices."""
        return self.roster.seed

    @property
    def costs(self) -> CostTable:
        """What sub-models cost: the model's costs, with what travels at low precision cheaper."""
        ways = (self.download_dtype, self.upload_dtype)
        return self.model.costs.sent_at(
            max(4.0 if dtype is None else bytes_per_value(dtype) for dtype in ways)
        )

    @property
    def profiles(self) -> dict[int, DeviceProfile]:
        """Device number -> its latest profile."""
        return self.told.latest

    @property
    def cloud(self) -> CloudModel:
        """The cloud model of this round: what devices are sent."""
        if self._cloud is None:
            raise RuntimeError("There is no cloud model before `start` or `configure_train`.")
        return self._cloud

    @property
    def merged(self) -> CloudModel:
        """The cloud model after this round's merge; the same as before where nothing changed."""
        return self._merged or self.cloud

    @property
    def state(self) -> dict[str, Tensor]:
        """The cloud model's body in this round, as devices got it."""
        return self.cloud.state

    # ---------------------------------------------------------------- derive

    def derive(self, profile: DeviceProfile, server_round: int) -> Selection:
        """Choose the modules of a device's sub-model in a round; override to choose otherwise.

        Raises
        ------
        InfeasibleBudgetError
            Nothing fits the device's budget: it is left out of the round.
        """
        if self.derive_on == "device":
            return profile.selection
        return derive(profile.importance, self.costs, profile.budget)

    def mixture(self, profile: DeviceProfile) -> Tensor | None:
        """Tell a device's sub-tasks, whose delta modules are merged into what it is sent.

        As the device told them, or else inferred from its importance.

        Returns
        -------
        Tensor or None
            float64 ``[S]``; None: nothing is known, or there are no delta modules.
        """
        if self.cloud.deltas is None or DELTAS not in profile.importance:
            return None
        if profile.mixture is not None:
            return torch.from_numpy(profile.mixture)
        gates = self.cloud.deltas.gates.numpy()
        return torch.from_numpy(mixture_from_importance(profile.importance, {DELTAS: gates}))

    def derive_all(
        self, profiles: Sequence[DeviceProfile], server_round: int
    ) -> list[Selection | InfeasibleBudgetError]:
        """Derive a round's sub-models: what `derive` says of each device, or why it refuses."""
        if type(self).derive is ECLM.derive and self.derive_on == "cloud":
            importances = [profile.importance for profile in profiles]
            budgets = [profile.budget for profile in profiles]
            return list(derive_all(importances, self.costs, budgets))
        derived: list[Selection | InfeasibleBudgetError] = []
        for profile in profiles:
            try:
                derived.append(self.derive(profile, server_round))
            except InfeasibleBudgetError as error:
                derived.append(error)
        return derived

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw devices, ask their profiles, and derive and pack a sub-model for each.

        Returns
        -------
        iterator of Message
            Each is packed when it is asked for.
        """
        return configure(self, MessageType.TRAIN, server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw devices and send each its own sub-model to evaluate."""
        return configure(self, MessageType.EVALUATE, server_round, arrays, config, grid)

    def take_over(self, arrays: ArrayRecord, server_round: int) -> None:
        """Make `arrays` the cloud model of a round.

        Raises
        ------
        RequestError
            They aren't those of the modular model.
        WrappedStrategyError
            A wrapper of Flower's that can't work with sub-models is driving this strategy.
        """
        refuse_wrappers(self)
        if self._merged is not None and self._merged.arrays is arrays:
            self._cloud = self._merged
        elif self._cloud is None or self._cloud.arrays is not arrays:
            opened = CloudModel.opened(self.model, arrays, version=server_round - 1)
            self._cloud = replace(opened, sent_as=self.download_dtype)
        self._merged = self._cloud

    def go_on_from(self, state: RunState) -> None:
        """Take over the state of an earlier run."""
        self._cloud = self._merged = replace(state.cloud, sent_as=self.download_dtype)
        self.told, self.selections = state.told, dict(state.selections)
        self.usual = list(state.usual)

    def initialize_parameters(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to be driven by a workflow of Flower's older API, which starts here."""
        refuse_workflow()

    # ----------------------------------------------------------------- merge

    def merge(self, updates: Iterable[Update]) -> dict[str, Tensor]:
        """Merge a round's updates into the cloud model; override to merge otherwise.

        Parameters
        ----------
        updates : iterator of Update
            What comes back and is checked, at least one, in the order of devices but for some that
            had to wait (`eclm_flower.adaptation.outliers.Peers`). To be iterated over once: each is
            read when it is asked for, so that few are in memory.

        Returns
        -------
        dict[str, Tensor]
            The body's state after. A tensor that is an object of `state` counts as unchanged; one
            that is not is compared.
        """
        knows_importance = self.uses_importance and self.derive_on == "cloud"
        return merge(
            self.state,
            updates,
            self.model.layers.values(),
            weighting=self.weighting if knows_importance else "examples",
            robust=self.robust,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what returns, module by module, as it comes; refuse what is broken."""
        if self.fraction_train == 0.0:
            return None, None
        training = Training(
            replies,
            self.phase.requests,
            state=self.state,
            layers=self.model.layers.values(),
            importance={
                request.device: self.profiles[request.device].importance
                for request in self.phase.requests
            },
            arrayrecord_key=self.arrayrecord_key,
            weighted_by_key=self.weighted_by_key,
            limits=self.limits,
            usual=self.usual,
            sent_as=self.upload_dtype,
            differences=self._difference,
        )
        self.reply_metrics = training.metrics
        updates = iter(training)
        delta_mean = None
        if self.cloud.deltas is not None and self.delta_step > 0 and self.robust is None:
            delta_mean = DeltaMean(self.cloud.deltas, self.state, self.model.layers.values())
            updates = delta_mean.observing(
                updates, {r.device: r.mixture for r in self.phase.requests if r.mixture is not None}
            )
        first = list(islice(updates, 1))
        merged = self.merge(_chained(first, updates)) if first else dict(self.state)
        received = training.done()
        usable = received.used
        self.phase.losses += received.counts
        if usable < self.min_replies:
            log(
                WARNING,
                "Round %s changes nothing: it has %s usable replies and min_replies is %s.",
                server_round,
                usable,
                self.min_replies,
            )
            self.phase.losses["unused"] += usable
            self.phase.count_modules(self.cloud, server_round)
            return None, self.phase.metrics()
        self.phase.used = usable
        self.usual = [*self.usual, *training.merged][-_REMEMBERED:]
        deltas = {}
        if delta_mean is not None:
            deltas = delta_mean.stepped(merged, step=self.delta_step)
        self._merged = self.cloud.after(server_round, merged, deltas)
        self.phase.count_modules(self._merged, server_round)
        contents = list(received.contents.values())
        metrics = MetricRecord()
        if contents:
            metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        metrics.update(self.phase.metrics())
        return self._merged.arrays, metrics

    def _difference(self, request: Request) -> dict[str, Tensor]:
        """Say what a device's sub-model differed by from the shared one."""
        if request.mixture is None or self.cloud.deltas is None:
            return {}
        return self.cloud.deltas.difference(request.selection, request.mixture)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the metrics of devices, each evaluated on its own sub-model."""
        received = read_evaluation(
            replies, self.phase.requests, weighted_by_key=self.weighted_by_key
        )
        self.phase.losses += received.counts
        self.phase.used = received.used
        if not received.contents:
            return None
        contents = list(received.contents.values())
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key)


def _chained(first: list[Update], rest: Iterator[Update]) -> Iterator[Update]:
    """Iterate over both, holding none."""
    while first:
        yield first.pop()
    yield from rest
