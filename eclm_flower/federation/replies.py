"""Which replies count: matched with what was asked, checked, counted by reason when lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.common.logger import log
from torch import Tensor

from eclm_flower.adaptation.outliers import FIRST, ChangeNorm, Limits, Peers
from eclm_flower.adaptation.profile import Importance
from eclm_flower.adaptation.update import (
    Update,
    check_examples,
    check_update,
    expected_shapes,
    sent,
)
from eclm_flower.errors import ReplyError
from eclm_flower.federation.exchange import failure, last_line
from eclm_flower.federation.wire import MODULES_PART, SHARED_PART, Form, by_part, unflattened
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.split import ModuleLayer

Record = TypeVar("Record", ArrayRecord, MetricRecord, ConfigRecord)

PLUGIN = "eclm."  # what the plugin adds to a record of the user's starts so
_MOST_BYTES_BESIDE_ARRAYS = 2**20


@dataclass
class Request:
    """What a device is sent in this round.

    Attributes
    ----------
    device : int
        Its number.
    selection : dict[str, sequence of int]
        Its modules.
    metadata : Metadata, optional
        Of the message, once that is made; Flower writes the message id into it when it is pushed.
    mixture : Tensor, optional
        ``[S]``: the sub-tasks whose delta modules are merged into its sub-model; None: of none.
    """

    device: int
    selection: Selection
    metadata: Metadata | None = None
    mixture: Tensor | None = None


@dataclass(frozen=True)
class Replies:
    """What came of a round's requests.

    Attributes
    ----------
    contents : dict[int, RecordDict]
        Device number -> content of its reply without the arrays, for those that count, in the order
        of devices. Its metrics are those that most devices report, so that they can be averaged key
        by key.
    used : int
        Replies that count, those of odd metrics included.
    counts : Counter
        Requests lost, by reason: "silent" (nothing came); "failed" (an error came) and
        "failed-<kind>"; "refused" (what came can't be used) and "refused-<reason>".
    """

    contents: dict[int, RecordDict]
    used: int
    counts: Counter[str]


class Training:
    """The replies to a round's training, read one by one: iterate over the updates that count.

    What can't be merged is refused, by device. Whoever iterates holds the only update there is at a
    time, but for those that wait: see `eclm_flower.adaptation.outliers.Peers`.

    Parameters
    ----------
    replies : iterable of Message
        What came. A collection is read in the order of devices; an iterator as it comes.
    requests : sequence of Request
        What is asked in this round; may become known (`Request.metadata`) while this iterates.
    state : dict[str, Tensor]
        The cloud model's body as it was sent.
    layers : iterable of ModuleLayer
        Its module layers.
    importance : dict[int, Importance]
        Device number -> the importance it reported.
    arrayrecord_key, weighted_by_key : str
        Where the arrays are, and the metric that weighs them.
    limits : Limits
        How far from its peers an update may be.
    usual : sequence of (float, float)
        Norm and examples of updates merged in earlier rounds.
    sent_as : torch.dtype, optional
        Devices return what changed, as this dtype; None: what it became, as it is.
    differences : callable, optional
        Request -> what its sub-model differed by from `state` (delta modules), keyed alike. It is
        taken off: all that follows compares with `state`.

    Attributes
    ----------
    metrics : dict[int, MetricRecord]
        Device number -> the metrics of the replies that were iterated over so far.
    merged : list of (float, float)
        Norm and examples of these.
    """

    def __init__(
        self,
        replies: Iterable[Message],
        requests: Sequence[Request],
        *,
        state: Mapping[str, Tensor],
        layers: Iterable[ModuleLayer],
        importance: Mapping[int, Importance],
        arrayrecord_key: str,
        weighted_by_key: str,
        limits: Limits,
        usual: Sequence[tuple[float, float]] = (),
        sent_as: torch.dtype | None = None,
        differences: Callable[[Request], Mapping[str, Tensor]] = lambda _: {},
    ) -> None:
        self._replies, self._requests = replies, requests
        self._state, self._layers = state, list(layers)
        self._importance = importance
        self._arrays, self._weight = arrayrecord_key, weighted_by_key
        self._peers = Peers(limits, usual)
        self._norm = ChangeNorm(state, self._layers)
        self._sent_as, self._differences = sent_as, differences
        self._contents: dict[int, RecordDict] = {}
        self._counts: Counter[str] = Counter()
        self.metrics: dict[int, MetricRecord] = {}
        self.merged: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[Update]:
        waiting: list[tuple[Update, float, RecordDict]] = []
        for request, content in _matched(self._replies, self._requests, self._counts):
            try:
                update, norm = self._read(request, content)
            except ReplyError as error:
                _refuse(request.device, error, self._counts)
                continue
            known = self._peers.join(update, norm)
            waiting.append((update, norm, _without_arrays(content)))
            del update, content
            new = 0 if known == FIRST else len(waiting) - 1  # who can be judged only now
            while known >= FIRST and new < len(waiting):
                if self._peers.usual(*waiting[new][:2]):
                    yield self._counted(*waiting.pop(new))
                else:
                    new += 1
        while waiting:
            update, norm, content = waiting.pop(0)
            if why := self._peers.refused(update, norm):
                _refuse(update.device, why, self._counts)
            else:
                yield self._counted(update, norm, content)

    def done(self) -> Replies:
        """Return what came of the requests, when all was iterated over."""
        return _replies(self._contents, self._counts)

    def _counted(self, update: Update, norm: float, content: RecordDict) -> Update:
        self._contents[update.device] = content
        self.metrics[update.device] = next(iter(_of(content, MetricRecord).values()))
        self.merged.append((norm, update.num_examples))
        return update

    def _read(self, request: Request, content: RecordDict) -> tuple[Update, float]:
        """Decode and check the sub-model in a reply; also the norm of its change."""
        _check_records(content, self._arrays)
        _check_metrics(content, self._weight)
        body = {
            key: Form(shape, self._state[key].dtype)
            for key, shape in expected_shapes(request.selection, self._state, self._layers).items()
        }
        parts = unflattened(
            _of(content, ArrayRecord)[self._arrays], by_part(body, self._layers), self._sent_as
        )
        tensors = {**parts[SHARED_PART], **parts[MODULES_PART]}
        if self._sent_as is not None:
            for key, before in sent(request.selection, self._state, self._layers):
                tensors[key] = before + tensors[key]
        else:
            for key, difference in self._differences(request).items():
                tensors[key] = tensors[key] - difference
        weight = next(iter(_of(content, MetricRecord).values()))[self._weight]
        update = Update(
            device=request.device,
            selection=request.selection,
            state={key: tensors[key] for key in body},
            importance=self._importance.get(request.device, {}),
            num_examples=float(weight),  # type: ignore[arg-type]
        )
        norm = self._norm.of(update)
        if not math.isfinite(norm):  # which says that something is wrong, but not what
            check_update(update, self._state, self._layers)
        return update, norm


def _without_arrays(content: RecordDict) -> RecordDict:
    """Copy a reply's content, which must not keep its arrays in memory."""
    return RecordDict({**_of(content, MetricRecord), **_of(content, ConfigRecord)})


def _of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Return the records of a kind.

    The views that Flower has for it refer to the content and the content to them: its arrays would
    stay in memory until the garbage collector looks, many replies later.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def read_evaluation(
    replies: Iterable[Message], requests: Sequence[Request], *, weighted_by_key: str
) -> Replies:
    """Read the metrics that came back; refuse, by device, what can't be averaged."""
    counts: Counter[str] = Counter()
    contents: dict[int, RecordDict] = {}
    for request, content in _matched(replies, requests, counts):
        try:
            _check_records(content, None)
            _check_metrics(content, weighted_by_key)
        except ReplyError as error:
            _refuse(request.device, error, counts)
        else:
            contents[request.device] = _without_arrays(content)
    return _replies(contents, counts)


def _replies(contents: Mapping[int, RecordDict], counts: Counter[str]) -> Replies:
    return Replies(_with_usual_metrics(dict(sorted(contents.items()))), len(contents), counts)


def _refuse(device: int, error: ReplyError, counts: Counter[str]) -> None:
    log(WARNING, "Reply of device %s is refused (%s): %s", device, error.reason, error)
    counts["refused"] += 1
    counts[f"refused-{error.reason}"] += 1


def _matched(
    replies: Iterable[Message], requests: Sequence[Request], counts: Counter[str]
) -> Iterator[tuple[Request, RecordDict]]:
    """Match replies with requests; of a collection in the order of devices.

    Of several replies to a request the first counts: who sends two gains nothing.
    """
    unanswered = {request.device: request for request in requests}
    ignored = 0
    for message in _in_order(replies, requests):
        answered = message.metadata.reply_to_message_id
        request = next(
            (r for r in unanswered.values() if r.metadata and r.metadata.message_id == answered),
            None,
        )
        if request is None:
            ignored += 1
            continue
        del unanswered[request.device]
        if message.has_error():
            log(WARNING, "Device %s failed: %s", request.device, last_line(message))
            counts["failed"] += 1
            counts[f"failed-{failure(message.error)}"] += 1
            continue
        content = message.content
        yield request, content
        del message, content
    for request in unanswered.values():
        log(WARNING, "Device %s did not answer in time.", request.device)
        counts["silent"] += 1
    if ignored:
        log(WARNING, "%s replies that answer no open request of this round are ignored.", ignored)


def _in_order(replies: Iterable[Message], requests: Iterable[Request]) -> Iterable[Message]:
    """Put a collection of replies in the order of devices."""
    if isinstance(replies, Iterator):
        return replies
    place = {r.metadata.message_id: r.device for r in requests if r.metadata}
    return sorted(replies, key=lambda reply: place.get(reply.metadata.reply_to_message_id, -1))


def _check_records(content: RecordDict, arrayrecord_key: str | None) -> None:
    """Refuse what a reply may not carry.

    A reply is one MetricRecord and, after training, one ArrayRecord. ConfigRecords of the user's
    own may be there. Which modules it holds is for the cloud alone to say.
    """
    metrics, arrays = list(_of(content, MetricRecord)), list(_of(content, ArrayRecord))
    if len(metrics) != 1:
        raise ReplyError(f"Expected one MetricRecord, got {metrics!r}.", "records")
    if arrayrecord_key is not None and arrays != [arrayrecord_key]:
        raise ReplyError(
            f"Expected one ArrayRecord, '{arrayrecord_key}', got {arrays!r}.", "records"
        )
    beside: list[MetricRecord | ConfigRecord] = [
        *_of(content, MetricRecord).values(),
        *_of(content, ConfigRecord).values(),
    ]
    size = sum(record.count_bytes() for record in beside)
    if size > _MOST_BYTES_BESIDE_ARRAYS:
        raise ReplyError(
            f"Expected up to {_MOST_BYTES_BESIDE_ARRAYS:,} bytes beside the arrays, got {size:,}.",
            "size",
        )
    claims = [key for record in beside for key in record if key.startswith(PLUGIN)]
    if claims:
        raise ReplyError(f"Expected no word on modules from a device, got {claims!r}.", "modules")


def _check_metrics(content: RecordDict, weighted_by_key: str) -> None:
    """Refuse metrics that are no numbers, and weights that weigh nothing."""
    metrics = next(iter(_of(content, MetricRecord).values()))
    weight = metrics.get(weighted_by_key)
    if not isinstance(weight, int | float):
        raise ReplyError(
            f"Expected a number as the metric '{weighted_by_key}', got {weight!r}.",
            "examples",
        )
    check_examples(weight)
    for key, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(number) for number in numbers):
            raise ReplyError(
                f"Expected finite numbers as the metric {key!r}; leave out what can't be computed.",
                "metrics",
            )


def _with_usual_metrics(contents: Mapping[int, RecordDict]) -> dict[int, RecordDict]:
    """Keep, of all metrics, those that more than half of the replies carry in the same form.

    Others are dropped, and a reply that lacks one of these is left out: what is left can be
    averaged key by key, and a minority can't make the majority's metrics look odd.
    """
    forms = {
        device: {
            (key, len(value) if isinstance(value, list) else None)
            for key, value in next(iter(_of(content, MetricRecord).values())).items()
        }
        for device, content in contents.items()
    }
    carried = Counter(form for of_device in forms.values() for form in of_device)
    usual = {form for form, number in carried.items() if 2 * number > len(contents)}
    result = {}
    for device, content in contents.items():
        missing = usual - forms[device]
        if missing:
            log(
                WARNING,
                "The metrics of device %s are left out of the averages: they lack %s, which most "
                "devices report.",
                device,
                sorted(key for key, _ in missing),
            )
        elif forms[device] == usual:
            result[device] = content
        else:
            result[device] = _only(content, {key for key, _ in usual})
    return result


def _only(content: RecordDict, keys: set[str]) -> RecordDict:
    """Copy a reply's content with these metrics only."""
    name, metrics = next(iter(_of(content, MetricRecord).items()))
    copied = RecordDict(dict(content))
    copied[name] = MetricRecord({key: value for key, value in metrics.items() if key in keys})
    return copied
