import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from eclm_flower.adaptation import Budget, DeviceProfile
from eclm_flower.errors import ReplyError
from eclm_flower.federation import content_bytes
from eclm_flower.federation.messages import (
    profile_from_content,
    profile_to_metrics,
    selection_from_config,
    selection_to_config,
    to_array,
    to_tensors,
)
from eclm_flower.modular.costs import Cost, CostTable

names = st.text("abc.012", min_size=1, max_size=8)
modules = st.lists(st.integers(0, 63), min_size=1, unique=True).map(lambda m: tuple(sorted(m)))
amounts = st.floats(0, 1e15) | st.just(math.inf)


@given(st.dictionaries(names, modules, min_size=1))
def test_a_selection_survives_the_wire(selection):
    config = ConfigRecord({"lr": 0.1, "note": "mine", **selection_to_config(selection)})
    assert selection_from_config(config) == selection


@given(
    st.integers(0, 2**63 - 1),
    st.tuples(amounts, amounts, amounts),
    st.dictionaries(names, st.lists(st.floats(0.01, 1), min_size=1, max_size=16), max_size=3),
)
def test_a_profile_survives_the_wire_exactly(device, limits, raw):
    importance = {name: np.array(values) / sum(values) for name, values in raw.items()}
    sent = DeviceProfile(
        device=device,
        budget=Budget(
            *(),
            **dict(
                zip(
                    ("communication_bytes", "computation_flops", "memory_bytes"),
                    limits,
                    strict=True,
                )
            ),
        ),
        importance=importance,
    )
    got = profile_from_content(RecordDict({"any key": profile_to_metrics(sent)}))
    assert (got.device, got.budget) == (sent.device, sent.budget)
    assert got.importance.keys() == importance.keys()
    assert all(np.array_equal(got.importance[name], importance[name]) for name in importance)


@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64]),
)
def test_a_tensor_survives_the_wire_bit_for_bit(shape, dtype):
    tensor = (torch.randn(shape) * 100).to(dtype)
    back = to_tensors(ArrayRecord({"body.w": to_array(tensor)}), "body.")["w"]
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)
    back.add_(1)  # writable, and not the sender's


def good() -> dict:
    sent = DeviceProfile(device=3, importance={"a": np.array([0.5, 0.5])})
    return dict(profile_to_metrics(sent))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("eclm.device", None, "integer eclm.device"),
        ("eclm.device", 0.5, "integer eclm.device"),
        ("eclm.budget.memory_bytes", None, "no usable budget"),
        ("eclm.budget.memory_bytes", -1.0, "no usable budget"),
        ("eclm.budget.memory_bytes", math.nan, "no usable budget"),
        ("eclm.budget.memory_bytes", [1.0], "no usable budget"),
        ("eclm.importance.a", [0.5, 0.6], "not a distribution"),
        ("eclm.importance.a", [1.5, -0.5], "not a distribution"),
        ("eclm.importance.a", [math.nan, 0.5], "not a distribution"),
        ("eclm.importance.a", [0.2, 0.3, 0.5], "importance of sizes"),
        ("eclm.importance.b", [1.0], "importance of sizes"),
        ("eclm.importance.a", 1.0, "importance of sizes"),
        ("eclm.mixture", [0.5, 0.5], "mixture of 2 sub-tasks, expected 0"),
        ("eclm.mixture", 1.0, "mixture of None"),
    ],
)
def test_a_broken_profile_is_refused_with_its_reason(key, value, reason):
    one = Cost(communication_bytes=1, computation_flops=1, memory_bytes=1)
    costs = CostTable(one, {"a": one}, {"a": 2})
    metrics = good()
    profile_from_content(RecordDict({"profile": MetricRecord(metrics)}), costs)
    metrics.pop(key, None)
    if value is not None:
        metrics[key] = value
    with pytest.raises(ReplyError, match=reason):
        profile_from_content(RecordDict({"profile": MetricRecord(metrics)}), costs)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ([0.5, 0.6, 0.0], "mixture is not a distribution"),
        ([1.5, -0.5, 0.0], "mixture is not a distribution"),
        ([math.nan, 0.5, 0.5], "mixture is not a distribution"),
        ([1.0], "mixture of 1 sub-tasks, expected 3"),
    ],
)
def test_a_broken_mixture_is_refused_with_its_reason(told, reason):
    one = Cost(communication_bytes=1, computation_flops=1, memory_bytes=1)
    costs = CostTable(one, {"a": one}, {"a": 2})
    sent = DeviceProfile(device=3, mixture=np.array([0.2, 0.3, 0.5]))
    metrics = dict(profile_to_metrics(sent))
    got = profile_from_content(RecordDict({"p": MetricRecord(metrics)}), costs, sub_tasks=3)
    assert got.mixture.tolist() == [0.2, 0.3, 0.5]
    metrics["eclm.mixture"] = told
    with pytest.raises(ReplyError, match=reason) as refused:
        profile_from_content(RecordDict({"p": MetricRecord(metrics)}), costs, sub_tasks=3)
    assert refused.value.reason == "mixture"


def test_bytes_are_those_of_the_objects_flower_uploads():
    content = RecordDict(
        {
            "arrays": ArrayRecord({f"k{i}": to_array(torch.randn(100, i + 1)) for i in range(3)}),
            "config": ConfigRecord({"empty": "", "numbers": [1, 2], "flag": True}),
        }
    )
    uploaded: dict[str, int] = {}

    def visit(thing):
        uploaded[thing.object_id] = len(thing.deflate())
        for child in (thing.children or {}).values():
            visit(child)

    visit(content)
    assert content_bytes(content) == sum(uploaded.values())
    payload = sum(100 * (i + 1) * 4 for i in range(3))
    assert payload < content_bytes(content) < payload + 3 * 600 + 800
