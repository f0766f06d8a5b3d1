"""Which replies count: matched with what was asked, checked, counted by reason when lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from logging import WARNING

from flwr.app import Message, Metadata, RecordDict
from flwr.common.logger import log
from torch import Tensor

from eclm_flower.adaptation.merge import Update, check_update
from eclm_flower.adaptation.profile import Importance
from eclm_flower.errors import ReplyError
from eclm_flower.federation.messages import BODY, to_tensors
from eclm_flower.federation.roster import last_line
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.split import ModuleLayer

_HEADER_BYTES = 4096  # more than the header of any serialised array


@dataclass(frozen=True)
class Request:
    """What was sent to a device in this round."""

    metadata: Metadata  # Flower writes the message id into it when the message is pushed
    device: int
    selection: Selection


def match(
    replies: Iterable[Message], requests: list[Request], weighted_by_key: str
) -> tuple[list[tuple[Request, RecordDict]], Counter[str]]:
    """Match replies with the requests of a round.

    Parameters
    ----------
    replies : iterable of Message
        What came, in any order.
    requests : list of Request
        What was asked in this round.
    weighted_by_key : str
        The metric that weighs a reply.

    Returns
    -------
    list of (Request, RecordDict)
        Usable replies in the order of devices.
    Counter
        Lost ones by reason: "failed" (an error came), "refused" (its metrics can't be used),
        "silent" (nothing came).
    """
    open_requests = {request.metadata.message_id: request for request in requests}
    matched: list[tuple[Request, RecordDict]] = []
    counts: Counter[str] = Counter()
    for message in replies:
        # A reply to no request of this round, or a second one to the same, finds nothing.
        request = open_requests.pop(message.metadata.reply_to_message_id, None)
        if request is None:
            log(WARNING, "A reply that answers no request of this round is ignored.")
        elif message.has_error():
            log(WARNING, "Device %s failed: %s", request.device, last_line(message))
            counts["failed"] += 1
        else:
            matched.append((request, message.content))
    counts["silent"] = len(requests) - len(matched) - counts["failed"]
    matched.sort(key=lambda pair: pair[0].device)

    # Metrics are averaged key by key, so those that differ from what most report are refused.
    shapes = [_metrics_shape(content, weighted_by_key) for _, content in matched]
    usual = Counter(shape for shape in shapes if shape).most_common(1)
    valid = []
    for pair, shape in zip(matched, shapes, strict=True):
        if shape and shape == usual[0][0]:
            valid.append(pair)
        else:
            log(
                WARNING,
                "Reply of device %s is refused: expected one MetricRecord with a positive '%s' "
                "and the same metrics as the other devices.",
                pair[0].device,
                weighted_by_key,
            )
            counts["refused"] += 1
    return valid, counts


def _metrics_shape(content: RecordDict, weighted_by_key: str) -> frozenset[tuple[str, int]] | None:
    """Keys and lengths of a reply's metrics; None if they can't weigh it."""
    if len(content.metric_records) != 1:
        return None
    metrics = next(iter(content.metric_records.values()))
    weight = metrics.get(weighted_by_key)
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
        return None
    return frozenset(
        (key, len(value) if isinstance(value, list) else -1) for key, value in metrics.items()
    )


def read_update(
    request: Request,
    content: RecordDict,
    *,
    importance: Importance,
    state: Mapping[str, Tensor],
    layers: Iterable[ModuleLayer],
    arrayrecord_key: str,
    weighted_by_key: str,
) -> Update:
    """Read and check the sub-model in a matched reply.

    Parameters
    ----------
    request, content : Request, RecordDict
        A pair from `match`.
    importance : dict[str, np.ndarray]
        The device's.
    state : dict[str, Tensor]
        The cloud model's body, for shapes and dtypes.
    layers : iterable of ModuleLayer
        Its module layers.
    arrayrecord_key, weighted_by_key : str
        Where the arrays are, and what weighs them.

    Raises
    ------
    ReplyError
        It can't be merged; the message says why.
    """
    arrays = content.array_records.get(arrayrecord_key)
    if arrays is None or len(content.array_records) != 1:
        raise ReplyError(f"Expected one ArrayRecord, '{arrayrecord_key}'.")
    foreign = [key for key in arrays if not key.startswith(BODY)]
    if foreign:
        raise ReplyError(f"Expected arrays of the body only, got {foreign[:3]}.")
    for key, array in arrays.items():
        whole = state.get(key.removeprefix(BODY))
        if whole is None or len(array.data) > whole.nbytes + _HEADER_BYTES:
            raise ReplyError(f"Expected no array '{key[:80]}' of {len(array.data):,} bytes.")
    try:
        returned = to_tensors(arrays, BODY)
    except Exception as error:  # whatever a device may send instead of an array
        raise ReplyError(f"Arrays can't be read: {error}.") from error
    weight = next(iter(content.metric_records.values()))[weighted_by_key]
    update = Update(
        device=request.device,
        selection=request.selection,
        state=returned,
        importance=importance,
        num_examples=float(weight),  # type: ignore[arg-type]
    )
    check_update(update, state, layers)
    return update
