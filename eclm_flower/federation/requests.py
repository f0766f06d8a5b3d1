"""What a phase sends: devices are drawn, tell their profile, and get their sub-model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from logging import WARNING
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from eclm_flower.errors import InfeasibleBudgetError
from eclm_flower.federation.exchange import Deadline
from eclm_flower.federation.messages import BATCH_NORM, DERIVES, UPLOAD, costs_to_config
from eclm_flower.federation.phase import Phase
from eclm_flower.federation.profiles import TTL_MARGIN
from eclm_flower.federation.replies import Request
from eclm_flower.federation.roster import EVALUATE, TRAIN

if TYPE_CHECKING:
    from eclm_flower.federation.strategy import ECLM

# Of a phase's time: new nodes may take this share to say who they are, devices until this share
# for their profile. The rest is for the work itself.
_GREETING_SHARE, _PROFILE_SHARE = 0.25, 0.5


def configure(
    strategy: ECLM,
    message_type: str,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    grid: Grid,
) -> Iterable[Message]:
    """Begin a phase of a round; see `ECLM.configure_train`."""
    if message_type == MessageType.TRAIN:
        purpose, fraction, least = TRAIN, strategy.fraction_train, strategy.min_train_nodes
    else:
        purpose, fraction, least = EVALUATE, strategy.fraction_evaluate, strategy.min_evaluate_nodes
    strategy.phase = Phase.that_asks_nobody()
    if fraction == 0.0:
        return []
    strategy.take_over(arrays, server_round)
    available = max(strategy.min_available_nodes, least)
    strategy.roster.wait(grid, at_least=available, timeout=strategy.timeout)

    seconds = strategy.round_timeout or strategy.timeout
    strategy.phase = phase = Phase(deadline=Deadline.after(seconds))
    profiles_until = Deadline.after(seconds * _PROFILE_SHARE)
    strategy.roster.greet(grid, at_least=available, until=Deadline.after(seconds * _GREETING_SHARE))
    devices = strategy.roster.sample(
        fraction=fraction, least=least, server_round=server_round, purpose=purpose
    )
    phase.asked = len(devices)
    phase.losses += strategy.told.update(
        grid,
        {device: strategy.roster.node_ids[device] for device in devices},
        server_round,
        lambda selector: _question(strategy, selector),
        strategy.cloud.selector_arrays,
        everyones=strategy.cloud.everyones_importance,
        until=profiles_until,
        costs=strategy.costs,
        sub_tasks=strategy.model.sub_tasks,
        traffic=phase.traffic,
    )
    profiles = [strategy.told.of_round(device, server_round) for device in devices]
    answered = [profile for profile in profiles if profile is not None]  # `ask` says who did not
    for profile, derived in zip(answered, strategy.derive_all(answered, server_round), strict=True):
        if isinstance(derived, InfeasibleBudgetError):
            log(WARNING, "Device %s is left out: %s", profile.device, derived)
            phase.losses["infeasible"] += 1
        else:
            strategy.selections[profile.device] = derived
            mixture = strategy.mixture(profile)
            phase.requests.append(Request(profile.device, derived, mixture=mixture))
    config["server-round"] = server_round  # as Flower's FedAvg does
    return _packed(strategy, phase.requests, config, message_type)


def _question(strategy: ECLM, selector: ArrayRecord | None) -> RecordDict:
    config = strategy.query_config
    if strategy.derive_on == "device":
        config = ConfigRecord({**config, DERIVES: True, **costs_to_config(strategy.costs)})
    question = RecordDict({strategy.configrecord_key: config})
    if selector is not None:
        question[strategy.arrayrecord_key] = selector
    return question


def _packed(
    strategy: ECLM, requests: Iterable[Request], config: ConfigRecord, message_type: str
) -> Iterator[Message]:
    """Pack sub-models when they are asked for, each in a record of its own."""
    for request in requests:
        device = request.device
        cached = strategy.profiles[device].cached
        cloud = strategy.cloud
        if request.mixture is not None:
            cloud = cloud.specialised(request.mixture)
        sub_model, what_it_is = cloud.pack(request.selection, cached)
        if strategy.upload_dtype is not None and message_type == MessageType.TRAIN:
            what_it_is[UPLOAD] = str(strategy.upload_dtype).removeprefix("torch.")
        told = ConfigRecord({**config, **what_it_is, BATCH_NORM: strategy.batch_norm})
        content = RecordDict({strategy.arrayrecord_key: sub_model, strategy.configrecord_key: told})
        del sub_model
        # A message that outlives its round would keep a straggler busy with old work.
        ttl = strategy.phase.deadline.left + TTL_MARGIN
        message = Message(content, strategy.roster.node_ids[device], message_type, ttl=ttl)
        del content
        request.metadata = message.metadata
        yield message
        del message
