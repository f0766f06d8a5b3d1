"""The device's side: three functions around the user's own training loop.

::

    @app.query()
    def query(msg, context):
        return profile(msg, context, model, loader, budget=Budget(memory_bytes=2e9))

    @app.train()
    def train(msg, context):
        sub_model = receive(msg, model)
        loss = my_training_loop(sub_model, loader)
        return reply(msg, sub_model, num_examples=len(loader.dataset), metrics={"loss": loss})
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from torch import Tensor, nn

from eclm_flower.adaptation.derivation import derive
from eclm_flower.adaptation.profile import Budget, DeviceProfile, Importance
from eclm_flower.adaptation.resizing import is_shrunk
from eclm_flower.errors import InfeasibleBudgetError, ReplyError, RequestError, SelectionError
from eclm_flower.federation.cache import ModuleCache, complete
from eclm_flower.federation.differences import ErrorFeedback, Received, change_of, remember
from eclm_flower.federation.messages import (
    BATCH_NORM,
    DERIVES,
    DOWNLOAD,
    PARTS,
    SENT,
    SHARED,
    UPLOAD,
    costs_from_config,
    dtype_from_config,
    is_distribution,
    profile_to_metrics,
    selection_from_config,
    the_only,
)
from eclm_flower.federation.node_budget import node_budget
from eclm_flower.federation.wire import (
    COLUMNS,
    LETTERS,
    MODULES_PART,
    SELECTOR_PART,
    SHARED_PART,
    by_part,
    flattened,
    forms,
    unflattened,
)
from eclm_flower.modular.batch_norm import BatchNormPolicy, apply_policy
from eclm_flower.modular.costs import CostTable
from eclm_flower.modular.model import ModularModel, body_of

_IMPORTANCE_STATE = "eclm.importance"

Batches = Iterable[Tensor | tuple[Tensor, ...]]


def receive(
    msg: Message,
    model: ModularModel,
    *,
    cache: ModuleCache | None = None,
    feedback: ErrorFeedback | None = None,
) -> nn.Module:
    """Build the sub-model a message carries.

    Parameters
    ----------
    msg : Message
        A train or evaluate message of the ECLM strategy.
    model : ModularModel
        The same modularised model as in the cloud; its weights are not used and not changed.
    cache : ModuleCache, optional
        Where this device keeps what it was sent; `profile` must be given the same.
    feedback : ErrorFeedback, optional
        Where this device keeps what its replies lose if the cloud asks for them at low precision
        (``ECLM(upload_dtype=...)``); without it they lose it for good.

    Returns
    -------
    nn.Module
        A model of the user's own type with just this device's modules. Its batch norm follows the
        policy the cloud chose.

    Raises
    ------
    RequestError
        The message does not come from the ECLM strategy, or for another model; or the cache
        lost what the cloud counts on.
    """
    arrays = msg.content.array_records[the_only(msg.content.array_records, "ArrayRecord")]
    config = msg.content.config_records[the_only(msg.content.config_records, "ConfigRecord")]
    selection = selection_of(msg)
    try:
        sub_model = model.sub_model(selection)
        body = body_of(sub_model)
        parts = by_part(forms(body.state_dict()), model.layers.values())
        if isinstance(sub_model, ModularModel):
            parts[SELECTOR_PART] = forms(sub_model.selector.state_dict())
        if f"{SENT}{SHARED}" not in config:
            tensors = unflattened(arrays, parts, dtype_from_config(config, DOWNLOAD))
        elif cache is None:
            raise RequestError(
                "The cloud sent only what this device's cache lacks, because `profile` was given a "
                "cache. Give receive(..., cache=...) the same one."
            )
        else:
            tensors = complete(arrays, config, model, parts, cache)
    except (ReplyError, SelectionError) as error:
        raise RequestError(
            f"The message does not fit this device's model: {error} Build and modularise the model "
            "alike in the cloud and on devices."
        ) from error
    body.load_state_dict({**tensors[SHARED_PART], **tensors[MODULES_PART]}, strict=False)
    if isinstance(sub_model, ModularModel):
        sub_model.selector.load_state_dict(tensors.pop(SELECTOR_PART), strict=False)
    upload = dtype_from_config(config, UPLOAD)
    if upload is not None and msg.metadata.message_type.startswith(MessageType.TRAIN):
        layers = list(model.layers.values())
        received = Received(
            tensors=tensors,
            layers=layers,
            selection=selection,
            dtype=upload,
            feedback=feedback,
        )
        remember(sub_model, received)
    return apply_policy(sub_model, cast(BatchNormPolicy, config[BATCH_NORM]))


def selection_of(msg: Message) -> dict[str, tuple[int, ...]]:
    """Read which modules a train or evaluate message carries: layer name -> module numbers.

    Raises
    ------
    RequestError
        The message does not come from the ECLM strategy.
    """
    config = msg.content.config_records[the_only(msg.content.config_records, "ConfigRecord")]
    selection = selection_from_config(config)
    if not selection:
        raise RequestError(
            "The message names no modules: it does not come from the ECLM strategy. Use "
            "strategy = ECLM(model) in the ServerApp."
        )
    return selection


def reply(
    msg: Message,
    sub_model: nn.Module | None = None,
    *,
    num_examples: int,
    metrics: Mapping[str, int | float | list[int] | list[float]] | None = None,
) -> Message:
    """Answer a train message (with the adapted sub-model) or an evaluate message (without).

    Parameters
    ----------
    msg : Message
        The message to answer.
    sub_model : nn.Module, optional
        What `receive` returned, trained.
    num_examples : int
        Examples trained or evaluated on; weighs this reply.
    metrics : dict, optional
        The user's own metrics.

    Raises
    ------
    RequestError
        The sub-model is still shrunk (see `Resizable`).
    """
    content = RecordDict(
        {"metrics": MetricRecord({**(metrics or {}), "num-examples": int(num_examples)})}
    )
    if sub_model is not None:
        if is_shrunk(sub_model):
            raise RequestError(
                "The sub-model is shrunk, and a reply carries all modules received: call grow() of "
                "its Resizable before reply."
            )
        key = the_only(msg.content.array_records, "ArrayRecord")
        config = msg.content.config_records[the_only(msg.content.config_records, "ConfigRecord")]
        whole = UPLOAD not in config
        arrays = _flat(sub_model, str(config[PARTS])) if whole else change_of(sub_model)
        content[key] = ArrayRecord(arrays)
    return Message(content, reply_to=msg)


def _flat(sub_model: nn.Module, parts: str) -> dict[str, Array]:
    """Lay out a sub-model's tensors as the cloud laid them out."""
    state = body_of(sub_model).state_dict()
    keys = list(forms(state))
    if len(keys) != len(parts):
        raise RequestError(
            f"Expected the model that receive returned, with {len(parts)} tensors, got "
            f"{type(sub_model).__name__} with {len(keys)}."
        )
    columns = [key for key, of in zip(keys, parts, strict=True) if of == COLUMNS]
    arrays: dict[str, Array] = {}
    for part in (SHARED_PART, MODULES_PART):
        letters = LETTERS[part]
        own = {key: state[key] for key, of in zip(keys, parts, strict=True) if of in letters}
        arrays.update(flattened(part, own, columns=columns))
    return arrays


def profile(
    msg: Message,
    context: Context,
    model: ModularModel,
    data: Batches | Callable[[], Batches],
    *,
    budget: Budget | None = None,
    mixture: Sequence[float] | np.ndarray | Tensor | None = None,
    cache: ModuleCache | None = None,
) -> Message:
    """Answer the cloud's query: who this device is, what it can spend, what matters to its data.

    Parameters
    ----------
    msg : Message
        A query message of the ECLM strategy. If it carries the selector, importance is computed.
    context : Context
        The device's number is its ``partition-id``, if its node config has one, or its node id.
    model : ModularModel
        The same modularised model as in the cloud; its selector is overwritten by the cloud's.
    data : iterable of batches, or a function that returns one
        Local inputs ``[B, ...]``, or tuples that start with them (a DataLoader). A function is
        called only when importance is asked for.
    budget : Budget, optional
        What the device can spend now; if not given, what its node config says (`node_budget`),
        unlimited if that says nothing.
    mixture : array of float, optional
        ``[S]``, the proportions of the sub-tasks in the local data, if they are known: the shares
        of the labels if sub-tasks are classes (`class_prior` serves better and tells nobody), all
        of one where the device knows its
        environment, all alike in one that is new. Not given: inferred from importance, which data
        unlike all that the cloud has seen can deceive.
    cache : ModuleCache, optional
        Where this device keeps what it was sent: the cloud will send only what is not there, or
        has changed since. Flower's mods that clip or add noise need whole messages: no cache then.

    Raises
    ------
    ValueError
        The mixture is not of the model's sub-tasks, or no distribution.
    """
    if mixture is not None:
        mixture = np.asarray(mixture, dtype=np.float64)
        if mixture.shape != (model.sub_tasks,) or not is_distribution(mixture):
            raise ValueError(
                f"Expected a mixture of {model.sub_tasks} proportions that add up to 1, one for "
                f"each sub-task of modularize(..., sub_tasks={model.sub_tasks}), got {mixture}."
            )
    importance = {}
    if msg.content.array_records:
        arrays = msg.content.array_records[the_only(msg.content.array_records, "ArrayRecord")]
        parts = {SELECTOR_PART: forms(model.selector.state_dict())}
        model.selector.load_state_dict(unflattened(arrays, parts)[SELECTOR_PART])
        importance = model.importance(data() if callable(data) else data)
    answer = DeviceProfile(
        device=int(context.node_config.get("partition-id", context.node_id)),
        budget=budget or node_budget(context.node_config, model.costs),
        importance=importance,
        mixture=mixture,
        cached=cache.digests(model.costs.modules) if cache else {},
    )
    config = next(iter(msg.content.config_records.values()), ConfigRecord())
    if config.get(DERIVES):
        answer = _derived(answer, costs_from_config(config, model.costs), context)
    return Message(RecordDict({"profile": profile_to_metrics(answer)}), reply_to=msg)


def _derived(answer: DeviceProfile, costs: CostTable | None, context: Context) -> DeviceProfile:
    """Derive the sub-model here, so that neither budget nor importance has to be told."""
    if costs is None:  # the cloud only asks who this is
        return DeviceProfile(device=answer.device)
    importance = _remembered(answer.importance, context)
    try:
        selection = derive(importance, costs, answer.budget)
    except InfeasibleBudgetError:
        return DeviceProfile(device=answer.device, infeasible=True)
    return replace(answer, selection=selection)


def _remembered(importance: Importance, context: Context) -> Importance:
    """Keep importance in the device's own state, or recall it when the selector did not come."""
    if importance:
        told = {layer: values.tolist() for layer, values in importance.items()}
        context.state[_IMPORTANCE_STATE] = MetricRecord(told)
        return importance
    if _IMPORTANCE_STATE not in context.state:
        raise RequestError(
            "This device no longer knows its importance; the cloud sends the selector again in a "
            "later round. Nothing has to be done."
        )
    kept = context.state.metric_records[_IMPORTANCE_STATE]
    return {layer: np.asarray(values) for layer, values in kept.items()}
