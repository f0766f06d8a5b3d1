"""Invariant 9: after a hostile or broken reply the cloud model is as if its device had failed."""

import io
import pickle
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from federated import build_model, eclm_app, grid_of
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from eclm_flower import ECLM, Budget
from eclm_flower.adaptation import Limits
from eclm_flower.errors import Reason
from eclm_flower.federation import InProcessGrid
from eclm_flower.federation.replies import Request, read_evaluation

LIAR = 1


def half(model, device):
    return Budget.share_of(model.costs, communication_bytes=0.5)


def run(app, *, nodes=5, grid=None, **options):
    model = build_model()
    strategy = ECLM(model, fraction_evaluate=0.0, **options)
    grid = grid or grid_of(app, nodes)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1, timeout=5)
    return result.arrays, result.train_metrics_clientapp[1]


def spoiled(change):
    """Let device 1's training reply be changed by `change(content)`."""

    def spoil(device, answer):
        if device == LIAR:
            change(answer.content)
        return answer

    return eclm_app(budget=half, spoil=spoil)


def failing(device, answer):
    if device == LIAR:
        raise RuntimeError("not here")
    return answer


@pytest.fixture(scope="module")
def without():
    """Run the same round with a device 1 that fails."""
    arrays, metrics = run(eclm_app(budget=half, spoil=failing))
    assert (metrics["eclm-merged"], metrics["eclm-failed"]) == (4, 1)
    return arrays, metrics


def same(one, other):
    return all(one[key].data == other[key].data for key in one)


def arrays_with(**entries):
    """Replace arrays by name; None deletes."""

    def change(content):
        arrays = dict(content["arrays"])
        for key, value in entries.items():
            name = key.replace("__", ".")
            if value is None:
                del arrays[name]
            else:
                arrays[name] = value(arrays.get(name)) if callable(value) else value
        content["arrays"] = ArrayRecord(arrays)

    return change


def modules_with(data):
    """Replace the bytes of an array, and leave alone what is said of them."""

    def replaced(good):
        content = data(good) if callable(data) else data
        return Array(good.dtype, good.shape, good.stype, content)

    return arrays_with(modules__float32=replaced)


def values(change):
    def changed(good):
        value = good.numpy().copy()
        return Array(change(value))

    return arrays_with(modules__float32=changed)


def metrics_with(**entries):
    def change(content):
        metrics = dict(content["metrics"])
        for key, value in entries.items():
            name = key.replace("_", "-")
            if value is None:
                del metrics[name]
            else:
                metrics[name] = value
        content["metrics"] = MetricRecord(metrics)

    return change


def record(key, value):
    def change(content):
        content[key] = value

    return change


def also_metric(key, value):
    return lambda content: content["metrics"].__setitem__(key, value)


def without_record(key):
    def change(content):
        del content[key]

    return change


def set_first(number):
    def change(value):
        value.flat[0] = number
        return value

    return values(change)


def npy(description, payload=b""):
    """Build npy bytes with a header of one's own."""
    return b"\x93NUMPY\x01\x00v\x00" + description.encode().ljust(117) + b"\n" + payload


def claimed(shape, dtype="<f4"):
    return npy(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}")


def saved(value, **options):
    file = io.BytesIO()
    np.save(file, value, **options)
    return file.getvalue()


BROKEN = {
    "a NaN": (set_first(np.nan), "not-finite"),
    "an infinity": (set_first(-np.inf), "not-finite"),
    "another shape": (values(lambda value: value[:-1]), "shape"),
    "a matrix of as many values": (values(lambda value: value.reshape(2, -1)), "shape"),
    "one that would broadcast": (values(lambda value: value[:1]), "shape"),
    "a header with an absurd shape": (modules_with(claimed("(100000000000000,)")), "shape"),
    "float64": (values(lambda value: value.astype(np.float64)), "dtype"),
    "integers": (values(lambda value: value.astype(np.int32)), "dtype"),
    "big endian": (values(lambda value: value.astype(">f4")), "dtype"),
    "fewer bytes than declared": (modules_with(lambda good: claimed(tuple(good.shape))), "size"),
    "an absurdly large array": (modules_with(b"x" * 100_000), "size"),
    "garbage": (modules_with(b"garbage"), "arrays"),
    "no bytes": (modules_with(b""), "arrays"),
    "a zip archive": (modules_with(b"PK\x03\x04 and so on"), "arrays"),
    "a header of brackets": (modules_with(npy("(" * 110)), "arrays"),
    "a pickle": (modules_with(pickle.dumps([1, 2, 3])), "arrays"),
    "a missing array": (arrays_with(modules__float32=None), "keys"),
    "a surplus array": (arrays_with(evil__float32=Array(np.zeros(3, np.float32))), "keys"),
    "the selector": (arrays_with(selector__float32=Array(np.zeros(4, np.float32))), "keys"),
    "no arrays": (without_record("arrays"), "records"),
    "a second record of arrays": (record("more", ArrayRecord()), "records"),
    "a second record of metrics": (record("more", MetricRecord()), "records"),
    "no metrics": (without_record("metrics"), "records"),
    "modules it was not given": (record("c", ConfigRecord({"eclm.modules.0": [0]})), "modules"),
    "modules among the metrics": (also_metric("eclm.modules.0", [0]), "modules"),
    "an absurd string": (record("note", ConfigRecord({"text": "x" * 2**21})), "size"),
    "an absurdly long list": (metrics_with(loss=[0.0] * 2**18), "size"),
    "no examples": (metrics_with(num_examples=0), "examples"),
    "a negative number of examples": (metrics_with(num_examples=-5), "examples"),
    "NaN examples": (metrics_with(num_examples=float("nan")), "examples"),
    "an absurd number of examples": (metrics_with(num_examples=1e308), "examples"),
    "more examples than the others": (metrics_with(num_examples=10_000), "examples"),
    "a list of examples": (metrics_with(num_examples=[20]), "examples"),
    "no number of examples": (metrics_with(num_examples=None), "examples"),
    "a loss that is NaN": (metrics_with(loss=float("nan")), "metrics"),
    "a norm far from the others'": (values(lambda value: value + 100), "norm"),
    "finite values beyond float32 when squared": (set_first(3e38), "norm"),
}


@pytest.mark.parametrize(("change", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_reply_is_refused_with_its_reason_and_touches_nothing(change, reason, without):
    arrays, metrics = run(spoiled(change))
    refused = {key: value for key, value in metrics.items() if key.startswith("eclm-refused")}
    assert refused == {"eclm-refused": 1, f"eclm-refused-{reason}": 1}
    assert metrics["eclm-merged"] == 4
    assert same(arrays, without[0])
    assert metrics["loss"] == without[1]["loss"]


def test_nothing_a_device_sends_is_unpickled(without):
    class Trap:
        def __reduce__(self):
            return (open, ("/nonexistent/trap", "w"))

    def trap(good):
        objects = np.empty(tuple(good.shape), dtype=object)
        objects[:] = Trap()
        return saved(objects, allow_pickle=True)

    arrays, metrics = run(spoiled(modules_with(trap)))
    assert metrics["eclm-refused-dtype"] == 1
    assert same(arrays, without[0])


class Repeating(InProcessGrid):
    """A grid on which device 1 answers twice, the second time with `second(content)`."""

    def __init__(self, *args, second, **options):
        super().__init__(*args, **options)
        self.second = second

    def pull_messages(self, message_ids):
        replies = []
        for reply in super().pull_messages(message_ids):
            replies.append(reply)
            if reply.metadata.src_node_id == 1000 + LIAR and reply.content.array_records:
                content = RecordDict(dict(reply.content))
                self.second(content)
                replies.append(Message(content, metadata=reply.metadata))
        return replies


@pytest.mark.parametrize(
    "second",
    [
        lambda content: None,
        metrics_with(num_examples=30),
        set_first(np.nan),
        without_record("arrays"),
    ],
    ids=["the same", "other", "broken", "empty"],
)
def test_of_two_replies_the_first_counts_whatever_the_second_is(second):
    once, _ = run(eclm_app(budget=half))
    twice, metrics = run(None, grid=Repeating(eclm_app(budget=half), 5, second=second))
    assert metrics["eclm-merged"] == 5
    assert metrics["eclm-refused"] == 0
    assert same(once, twice)


def test_who_answers_wrongly_first_gets_no_second_try(without):
    good = []

    def spoil(device, answer):
        if device == LIAR:
            good.append(dict(answer.content["arrays"]))
            set_first(np.nan)(answer.content)
        return answer

    def repaired(content):
        content["arrays"] = ArrayRecord(good[-1])

    app = eclm_app(budget=half, spoil=spoil)
    arrays, metrics = run(None, grid=Repeating(app, 5, second=repaired))
    assert metrics["eclm-refused-not-finite"] == metrics["eclm-refused"] == 1
    assert same(arrays, without[0])


@pytest.mark.parametrize(
    "change", [metrics_with(loss=[1.0, 2.0]), metrics_with(loss=None)], ids=["list", "missing"]
)
def test_a_reply_of_other_metrics_is_merged_and_left_out_of_the_averages(change, without):
    plain, _ = run(eclm_app(budget=half))
    arrays, metrics = run(spoiled(change))
    assert (metrics["eclm-merged"], metrics["eclm-refused"]) == (5, 0)
    assert same(arrays, plain)
    assert metrics["loss"] == without[1]["loss"]  # of the other four


def lying(app, change):
    """Let device 1's answers to queries be changed by `change(metrics)`."""
    query = app._registered_funcs["query.default"]

    def lie(message, context):
        answer = query(message, context)
        if context.node_config["partition-id"] == LIAR and message.content.array_records:
            change(answer.content["profile"])
        return answer

    app._registered_funcs["query.default"] = lie
    return app


def told(key, value):
    return lambda metrics: metrics.__setitem__(key, value)


LIES = {
    "a NaN": (told("eclm.importance.0", [float("nan"), 0.5, 0.25, 0.25]), "importance"),
    "a negative share": (told("eclm.importance.0", [1.5, -0.5, 0.0, 0.0]), "importance"),
    "a sum of 4": (told("eclm.importance.0", [1.0, 1.0, 1.0, 1.0]), "importance"),
    "too many modules": (told("eclm.importance.0", [0.2] * 5), "importance"),
    "no list": (told("eclm.importance.0", 1.0), "importance"),
    "a layer there is not": (told("eclm.importance.7", [1.0]), "importance"),
    "a negative budget": (told("eclm.budget.memory_bytes", -1.0), "budget"),
    "a NaN budget": (told("eclm.budget.memory_bytes", float("nan")), "budget"),
    "another number": (told("eclm.device", 3), "device"),
    "no number": (told("eclm.device", 1.5), "device"),
    "a negative number": (told("eclm.device", -1), "device"),
}


@pytest.mark.parametrize(("change", "reason"), LIES.values(), ids=LIES.keys())
def test_a_broken_profile_is_refused_with_its_reason(change, reason, without):
    arrays, metrics = run(lying(eclm_app(budget=half), change))
    assert metrics["eclm-refused"] == metrics[f"eclm-refused-{reason}"] == 1
    assert metrics["eclm-merged"] == 4
    assert same(arrays, without[0])


def test_a_node_that_claims_the_number_of_another_is_left_out():
    four, _ = run(eclm_app(budget=half), nodes=4)
    grid = grid_of(eclm_app(budget=half), 5, node_config={4: {"partition-id": LIAR}})
    five, metrics = run(None, grid=grid)
    assert metrics["eclm-merged"] == 4
    assert same(four, five)


def test_the_docs_explain_every_reason():
    docs = (Path(__file__).parents[2] / "docs" / "robustness.md").read_text()
    rows = "".join(line for line in docs.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([a-z-]+)`(?:,| \|)", rows)) == set(get_args(Reason))


def test_limits_can_be_switched_off():
    app = spoiled(values(lambda value: value + 100))
    _, metrics = run(app, limits=Limits(norm=None))
    assert metrics["eclm-merged"] == 5


def requests_and_replies(metrics):
    """Build an evaluation's requests and replies, one for each of the metrics."""
    grid_of(eclm_app(), 1)  # messages can only be made inside a run
    requests, replies = [], []
    for device, of_device in enumerate(metrics):
        question = Message(RecordDict(), dst_node_id=device + 1, message_type="evaluate")
        question.metadata.__dict__["_message_id"] = f"question {device}"
        requests.append(Request(device, {}, question.metadata))
        content = RecordDict({"metrics": MetricRecord(of_device)})
        replies.append(Message(content, reply_to=question))
    return requests, replies


entries = st.dictionaries(
    st.sampled_from(["loss", "accuracy", "junk"]),
    st.floats(-1, 1) | st.lists(st.floats(-1, 1), max_size=3),
)


@given(st.integers(1, 5), st.lists(entries, max_size=5), st.data())
def test_a_minority_never_gets_others_refused(honest, hostile, data):
    """Whatever up to half of the devices report beside the weight."""
    hostile = [{**metrics, "num-examples": 1} for metrics in hostile[:honest]]
    good = {"num-examples": 10, "loss": 0.5, "curve": [1.0, 2.0]}
    order = data.draw(st.permutations(range(honest + len(hostile))))
    everyone = [good] * honest + hostile
    requests, replies = requests_and_replies([everyone[position] for position in order])
    read = read_evaluation(replies, requests, weighted_by_key="num-examples")
    for device, position in enumerate(order):
        if position < honest:
            assert device in read.contents
    forms = {
        tuple((key, np.shape(value)) for key, value in sorted(content["metrics"].items()))
        for content in read.contents.values()
    }
    assert len(forms) == 1  # so that they can be averaged key by key
    assert not read.counts
    assert read.used == len(everyone)


def test_a_metric_that_few_report_is_left_out_of_the_average():
    good = {"num-examples": 10, "loss": 0.5}
    requests, replies = requests_and_replies([good, {**good, "mine": 7.0}, good])
    read = read_evaluation(replies, requests, weighted_by_key="num-examples")
    assert [dict(content["metrics"]) for content in read.contents.values()] == [good] * 3
    assert "mine" in replies[1].content["metrics"]  # the reply itself is left as it is


def test_a_fortran_ordered_array_is_read_as_what_it_is(without):
    plain, _ = run(eclm_app(budget=half))
    mixed, metrics = run(spoiled(values(np.asfortranarray)))
    assert metrics["eclm-merged"] == 5
    assert same(plain, mixed)


def test_records_of_the_users_own_may_come_along():
    plain, _ = run(eclm_app(budget=half))
    arrays, metrics = run(spoiled(record("note", ConfigRecord({"battery": "low"}))))
    assert metrics["eclm-merged"] == 5
    assert same(plain, arrays)
