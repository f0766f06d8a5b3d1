"""What of a device's change goes to the delta modules of its sub-tasks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eclm_flower.adaptation import merge
from eclm_flower.adaptation.delta_merge import DeltaMean
from eclm_flower.modular.deltas import DeltaModules

S = 2
HALF = {"0": (0, 1), "1": (0, 1)}


@pytest.fixture
def deltas(model):
    result = DeltaModules(model.body, model.layers.values(), S, core_share=0.5)
    with torch.no_grad():
        for number, tensor in enumerate(result.tensors.values()):
            tensor.fill_(float(number))
    return result


def after(deltas, state, layers, updates, mixtures, step=1.0):
    mean = DeltaMean(deltas, state, layers)
    passed = list(mean.observing(updates, mixtures))
    assert passed == list(updates)
    merged = merge(state, updates, layers, weighting="examples")
    stepped = mean.stepped(merged, step=step)
    return {key: stepped[next(iter(deltas.named({key: None})))] for key in deltas.tensors}


def change(update, state, layers, key):
    """The change of the first two modules, or of all that is shared."""
    for layer in layers:
        if key in layer.axes:
            new, old = layer.packed(key, update.state[key]), layer.packed(key, state[key])
            return new[:2] - old[:2]
    return (update.state[key] - state[key])[None]


def view(layers, key, tensor):
    for layer in layers:
        if key in layer.axes:
            return layer.packed(key, tensor)
    return tensor[None]


def test_what_the_devices_of_a_sub_task_change_beyond_all_goes_to_its_delta(
    model, state, layers, deltas, update_of
):
    """Three devices, two of them of the first sub-task."""
    updates = [update_of(0, num_examples=1), update_of(1, num_examples=3), update_of(2)]
    mixtures = {0: [1.0, 0.0], 1: [1.0, 0.0], 2: [0.0, 1.0]}
    result = after(deltas, state, layers, updates, mixtures)
    for key, before in deltas.tensors.items():
        changes = [change(update, state, layers, key) for update in updates]
        common = (changes[0] + 3 * changes[1] + changes[2]) / 5
        first = (changes[0] + 3 * changes[1]) / 4
        expected = [2 / 3 * (first - common), 1 / 2 * (changes[2] - common)]
        for s in range(S):
            moved = view(layers, key, result[key][s]) - view(layers, key, before[s])
            torch.testing.assert_close(moved, expected[s], atol=1e-6, rtol=1e-4)


def test_a_change_goes_to_the_sub_tasks_whose_differences_were_sent(
    state, layers, deltas, update_of
):
    updates = [update_of(0), update_of(1), update_of(2)]
    mixtures = {0: [0.75, 0.25], 1: [0.0, 1.0], 2: [0.5, 0.5]}
    result = after(deltas, state, layers, updates, mixtures)
    key = "0.weight"
    changes = [change(update, state, layers, key) for update in updates]
    common = sum(changes) / 3
    for s, believed in ((0, 0.75 / 1.75), (1, 1 / 2)):
        moved = view(layers, key, result[key][s]) - view(layers, key, deltas.tensors[key][s])
        torch.testing.assert_close(moved, believed * (changes[s] - common), atol=1e-6, rtol=1e-4)


@given(step=st.sampled_from([0.0, 1.0]), held=st.sampled_from([(0,), (1,), (3,)]))
def test_what_nobody_of_a_sub_task_held_stays_bit_for_bit(
    model, state, layers, update_of, step, held
):
    deltas = DeltaModules(model.body, model.layers.values(), S, core_share=0.5)
    with torch.no_grad():
        for tensor in deltas.tensors.values():
            tensor.normal_()
    selection = {"0": held, "1": (0, 1)}
    updates = [update_of(0, selection), update_of(1)]
    result = after(deltas, state, layers, updates, {0: [1.0, 0.0]}, step)
    for key, before in deltas.tensors.items():
        assert torch.equal(result[key][1], before[1])  # nobody is of the second one
        same = (view(layers, key, result[key][0]) == view(layers, key, before[0])).flatten(1).all(1)
        if step == 0:
            assert same.all()
        elif key in layers[0].axes:
            assert same.tolist() == [module not in held for module in range(2)]


def test_a_device_of_no_known_sub_task_changes_no_delta(state, layers, deltas, update_of):
    result = after(deltas, state, layers, [update_of(0), update_of(1)], {})
    assert all(torch.equal(result[key], tensor) for key, tensor in deltas.tensors.items())


def test_if_all_change_alike_deltas_stay(state, layers, deltas, update_of):
    updates = [update_of(0, HALF), update_of(0, HALF)]
    result = after(deltas, state, layers, updates, {0: [1.0, 0.0]})
    for key, tensor in deltas.tensors.items():
        torch.testing.assert_close(result[key], tensor.detach(), atol=1e-6, rtol=0)
    assert np.isfinite([float(t.detach().sum()) for t in deltas.tensors.values()]).all()
