"""Tensors laid end to end come out as they went in, or the array is refused."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from eclm_flower.errors import ReplyError
from eclm_flower.federation.wire import (
    BLOCK,
    MODULES_PART,
    Form,
    by_part,
    flattened,
    forms,
    rounded,
    unflattened,
)
from eclm_flower.modular.split import Axis, ModuleLayer, in_columns

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
shapes = st.lists(st.integers(0, 4), max_size=3)
states = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6)


def drawn(of):
    """A state of these shapes and dtypes, every value of it another."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"t{number}": torch.randn(shape, generator=generator).to(dtype)
        for number, (shape, dtype) in enumerate(of)
    }


def same(one, other):
    return list(one) == list(other) and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@given(states, states)
def test_parts_of_mixed_dtypes_come_out_bit_for_bit(shared, modules):
    parts = {"shared": drawn(shared), "modules": drawn(modules)}
    arrays = {}
    for part, state in parts.items():
        arrays.update(flattened(part, state))
    assert len(arrays) == sum(len({dtype for _, dtype in of}) for of in (shared, modules))
    got = unflattened(
        dict(reversed(arrays.items())), {part: forms(state) for part, state in parts.items()}
    )
    assert got.keys() == parts.keys()
    assert all(same(got[part], state) for part, state in parts.items())


@given(states)
def test_bytes_are_those_of_the_values_and_a_header(of):
    arrays = flattened("shared", drawn(of))
    for dtype in {dtype for _, dtype in of}:
        values = sum(math.prod(shape) for shape, own in of if own == dtype)
        array = arrays[f"shared.{str(dtype).removeprefix('torch.')}"]
        assert len(array.data) == 128 + values * dtype.itemsize


def test_counters_and_masks_do_not_travel():
    state = {"w": torch.ones(2), "n": torch.tensor(3), "mask": torch.ones(2, dtype=torch.bool)}
    assert forms(state) == {"w": Form((2,), torch.float32)}


def test_what_comes_out_is_a_view_of_what_came():
    state = drawn([([2, 3], torch.float32), ([4], torch.float32)])
    arrays = flattened("shared", state)
    tensors = unflattened(arrays, {"shared": forms(state)})["shared"]
    memory = np.frombuffer(arrays["shared.float32"].data, dtype=np.uint8)
    start = memory.__array_interface__["data"][0]
    assert all(start <= t.data_ptr() < start + memory.nbytes for t in tensors.values())


LAYER = ModuleLayer(
    name="layer",
    modules=4,
    units=8,
    axes={"rows": Axis(0), "columns": Axis(1), "matrix": Axis(1)},
    mixer="columns",
    channel_axis=1,
)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_a_module_that_lies_along_a_later_axis_travels_in_one_piece(dtype):
    shapes = [[8, 3, 2], [5, 8, 3, 3], [5, 8]]
    state = {
        key: torch.arange(math.prod(shape), dtype=torch.float32).view(shape) % 100
        for key, shape in zip(LAYER.axes, shapes, strict=True)
    }
    parts = by_part(forms(state), [LAYER])
    assert [form.columns for form in parts[MODULES_PART].values()] == [False, True, True]
    arrays = flattened(MODULES_PART, state, dtype, columns={"columns", "matrix"})
    got = unflattened(arrays, {MODULES_PART: parts[MODULES_PART]}, dtype)[MODULES_PART]
    tolerance = {"atol": 0.5, "rtol": 0} if dtype == torch.int8 else {"atol": 0, "rtol": 0}
    for key, tensor in state.items():
        torch.testing.assert_close(got[key], tensor, **tolerance)
    assert in_columns(got["matrix"])
    assert not in_columns(got["rows"])
    for module in LAYER.packed("matrix", got["matrix"]):
        assert module[0].stride() == (5, 1)  # [h, out], end to end


@given(states, st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_gives_the_rounded_values_in_the_tensors_own_dtype(of, dtype):
    state = drawn(of)
    arrays = flattened("modules", state, dtype)
    assert len(arrays) == 1
    got = unflattened(arrays, {"modules": forms(state)}, dtype)["modules"]
    # Halves go through float32, as they are laid out beside the others.
    assert same(got, {key: rounded(t.float(), dtype).to(t.dtype) for key, t in state.items()})


@given(st.integers(0, 3 * BLOCK), st.floats(1e-6, 1e6))
def test_8_bit_integers_are_off_by_at_most_half_a_step_of_their_block(size, scale):
    values = scale * torch.randn(size, generator=torch.Generator().manual_seed(size))
    values[BLOCK:] *= 1000
    state = {"a": values[: size // 3], "b": values[size // 3 :]}
    arrays = flattened("modules", state, torch.int8)
    tensors = unflattened(arrays, {"modules": forms(state)}, torch.int8)["modules"]
    got = torch.cat(list(tensors.values()))
    for block, sent in zip(values.split(BLOCK), got.split(BLOCK), strict=True):
        if len(block):
            assert (block - sent).abs().max() <= block.abs().max() / 127 * 0.501


def test_zeros_stay_zeros_as_8_bit_integers():
    state = {"a": torch.zeros(5)}
    arrays = flattened("modules", state, torch.int8)
    got = unflattened(arrays, {"modules": forms(state)}, torch.int8)["modules"]
    assert same(got, state)


STATE = {"w": torch.arange(6.0).view(2, 3), "h": torch.ones(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (lambda a: a.pop("shared.bfloat16"), "keys", r"missing \['shared.bfloat16'\]"),
        (lambda a: a.update({"body.w": a["shared.float32"]}), "keys", r"surplus \['body.w'\]"),
        (
            lambda a: a.update({"modules.float32": a.pop("shared.float32")}),
            "keys",
            r"missing \['shared.float32'\], surplus \['modules.float32'\]",
        ),
        (
            lambda a: a.update({"shared.float32": Array(np.zeros(5, np.float32))}),
            "shape",
            r"of shape \[6\], got \[5\]",
        ),
        (
            lambda a: a.update({"shared.float32": Array(np.zeros((2, 3), np.float32))}),
            "shape",
            r"of shape \[6\], got \[2, 3\]",
        ),
        (
            lambda a: a.update({"shared.float32": Array(np.zeros(6, np.int32))}),
            "dtype",
            "of float32, got int32",
        ),
        (
            lambda a: a.update({"shared.bfloat16": Array(np.zeros(2, np.float16))}),
            "dtype",
            "of int16, got float16",
        ),
        (
            lambda a: a.update({"shared.float32": Array(np.zeros(10_000, np.float32))}),
            "size",
            "at most 24 bytes",
        ),
    ],
)
def test_what_is_not_as_expected_is_refused(change, reason, said):
    arrays = flattened("shared", STATE)
    assert same(unflattened(arrays, {"shared": forms(STATE)})["shared"], STATE)
    change(arrays)
    with pytest.raises(ReplyError, match=said) as refused:
        unflattened(arrays, {"shared": forms(STATE)})
    assert refused.value.reason == reason
