"""A round is merged reply by reply: the same numbers as from a list, and one update in memory."""

import gc
import weakref
from dataclasses import dataclass, field

import pytest
from federated import build_model, eclm_app, grid_of
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

import eclm_flower.federation.strategy as strategy_module
from eclm_flower import ECLM, Budget
from eclm_flower.adaptation.outliers import FIRST
from eclm_flower.federation.replies import Training

USUAL = [(0.03, 25.0)] * FIRST  # so that nobody has to wait


def half(model, device):
    return Budget.share_of(model.costs, communication_bytes=0.5)


def answered(usual=USUAL, nodes=5, **options):
    """A strategy in the middle of round 1, and the replies that came, in the order of devices."""
    model = build_model()
    strategy = ECLM(model, **options)
    strategy.usual = list(usual)
    grid = grid_of(eclm_app(budget=half), nodes)
    arrays = ArrayRecord(model.state_dict())
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    return strategy, list(grid.send_and_receive(messages))


@pytest.mark.parametrize("usual", [[], USUAL], ids=["all wait", "none waits"])
def test_an_iterator_gives_bit_for_bit_what_a_list_in_any_order_gives(usual):
    strategy, replies = answered(usual)
    ordered = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
    streamed, metrics = strategy.aggregate_train(1, iter(ordered))
    strategy.usual = list(usual)
    listed, _ = strategy.aggregate_train(1, ordered[::-1])
    assert metrics["eclm-merged"] == 5
    assert all(streamed[key].data == listed[key].data for key in listed)


@dataclass
class Alive:
    """Counts the updates that are in memory when the next one is read."""

    refs: list = field(default_factory=list)
    most: int = 0

    def watch(self, monkeypatch):
        read = Training._read

        def counted(training, request, content):
            gc.collect()
            self.most = max(self.most, sum(ref() is not None for ref in self.refs))
            update, norm = read(training, request, content)
            self.refs.append(weakref.ref(update))
            return update, norm

        monkeypatch.setattr(strategy_module.Training, "_read", counted)


def test_no_update_is_in_memory_when_the_next_is_read(monkeypatch):
    strategy, replies = answered()
    alive = Alive()
    alive.watch(monkeypatch)
    strategy.aggregate_train(1, iter(replies))
    assert len(alive.refs) == 5
    assert alive.most == 0
    gc.collect()
    assert not any(ref() for ref in alive.refs)


def test_only_those_far_from_what_is_usual_wait_in_memory(monkeypatch):
    strategy, replies = answered()
    for reply in replies[:2]:
        reply.content["metrics"]["num-examples"] = 10_000
    alive = Alive()
    alive.watch(monkeypatch)
    _, metrics = strategy.aggregate_train(1, iter(replies))
    assert alive.most == 2
    assert metrics["eclm-refused-examples"] == 2


def test_replies_keep_no_arrays():
    strategy, replies = answered()
    training = Training(
        iter(replies),
        strategy.phase.requests,
        state=strategy.state,
        layers=strategy.model.layers.values(),
        importance={device: told.importance for device, told in strategy.profiles.items()},
        arrayrecord_key="arrays",
        weighted_by_key="num-examples",
        limits=strategy.limits,
    )
    assert len(list(training)) == 5
    contents = training.done().contents
    assert list(contents) == [0, 1, 2, 3, 4]
    assert not any(content.array_records for content in contents.values())
    assert all(reply.content.array_records for reply in replies)  # they are left as they are


def test_a_run_with_a_window_has_the_same_numbers():
    def run(window):
        model = build_model()
        strategy = ECLM(model, window=window)
        return strategy.start(
            grid_of(eclm_app(budget=half), 6), ArrayRecord(model.state_dict()), 3, timeout=5
        )

    every, two = run(None), run(2)
    assert all(every.arrays[key].data == array.data for key, array in two.arrays.items())
    assert every.evaluate_metrics_clientapp == two.evaluate_metrics_clientapp


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_room_is_refused(window):
    with pytest.raises(ValueError, match="Expected window >= 1 or None"):
        ECLM(build_model(), window=window)


def test_arrays_leave_memory_without_the_garbage_collector():
    """It would only look many replies later."""
    strategy, replies = answered()
    alive, most = [], []

    def arriving():
        while replies:
            most.append(sum(ref() is not None for ref in alive))
            reply = replies.pop(0)
            content = RecordDict(dict(reply.content))
            fresh = {k: Array(a.numpy()) for k, a in reply.content["arrays"].items()}
            content["arrays"] = ArrayRecord(fresh)
            alive.extend(weakref.ref(array) for array in content["arrays"].values())
            del fresh
            yield Message(content, metadata=reply.metadata)
            del content

    gc.disable()
    try:
        strategy.aggregate_train(1, arriving())
    finally:
        gc.enable()
    assert len(alive) == 2 * 5
    assert most == [0] * 5
