"""Invariant 5: a merge is order-free, leaves alone what nobody returned, and includes FedAvg."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eclm_flower.adaptation import merge

MODULES = 4
WEIGHTINGS = ["importance-examples", "importance", "examples"]
EVERYTHING = {"0": tuple(range(MODULES)), "1": tuple(range(MODULES))}
EQUAL = {name: np.full(MODULES, 1 / MODULES) for name in EVERYTHING}


def draw_updates(data, update_of, least=1):
    some = st.sets(st.integers(0, MODULES - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    score = st.just(0.0) | st.floats(1e-6, 1)
    scores = st.lists(score, min_size=MODULES, max_size=MODULES).map(np.array)
    devices = data.draw(st.lists(st.integers(0, 99), min_size=least, max_size=4, unique=True))
    return [
        update_of(
            device,
            selection={name: data.draw(some) for name in EVERYTHING},
            importance={name: data.draw(scores) for name in EVERYTHING},
            num_examples=data.draw(st.integers(1, 500)),
        )
        for device in devices
    ]


@given(data=st.data(), weighting=st.sampled_from(WEIGHTINGS))
def test_the_order_of_replies_does_not_matter(state, layers, update_of, data, weighting):
    updates = draw_updates(data, update_of, least=2)
    other_order = data.draw(st.permutations(updates))
    merged = merge(state, updates, layers, weighting=weighting)
    again = merge(state, other_order, layers, weighting=weighting)
    assert list(merged) == list(again)
    assert all(torch.equal(merged[key], again[key]) for key in merged)


@given(data=st.data(), weighting=st.sampled_from(WEIGHTINGS))
def test_an_iterator_in_the_order_of_devices_gives_bit_for_bit_what_a_list_gives(
    state, layers, update_of, data, weighting
):
    updates = draw_updates(data, update_of)
    merged = merge(state, updates, layers, weighting=weighting)
    in_order = iter(sorted(updates, key=lambda update: update.device))
    again = merge(state, in_order, layers, weighting=weighting)
    assert all(torch.equal(merged[key], again[key]) for key in merged)


def test_an_iterator_is_merged_as_it_goes_and_no_update_is_held(state, layers, update_of):
    def updates():
        for device in range(3):
            assert not any(ref() for ref in earlier)
            update = update_of(device)
            earlier.append(weakref.ref(update))
            yield update
            del update

    earlier: list = []
    merge(state, updates(), layers)
    assert len(earlier) == 3


@given(data=st.data(), weighting=st.sampled_from(WEIGHTINGS))
def test_a_module_is_the_weighted_mean_of_those_that_hold_it(
    state, layers, update_of, data, weighting
):
    """Against a slow loop over layers, modules, tensors and updates."""
    updates = draw_updates(data, update_of)
    merged = merge(state, updates, layers, weighting=weighting)
    for layer in layers:
        for module in range(MODULES):
            holders = [u for u in updates if module in u.selection[layer.name]]
            weights = np.ones(len(holders))
            if weighting != "examples":
                weights *= [u.importance[layer.name][module] for u in holders]
            if weighting != "importance":
                weights *= [u.num_examples for u in holders]
            if not weights.any():
                weights = np.ones(len(holders))
            for key in layer.axes:
                if not holders:
                    expected = layer.packed(key, state[key])[module]
                    assert torch.equal(layer.packed(key, merged[key])[module], expected)
                    continue
                returned = [
                    layer.packed(key, u.state[key])[u.selection[layer.name].index(module)]
                    for u in holders
                ]
                expected = sum(
                    w * t for w, t in zip(weights / weights.sum(), returned, strict=True)
                )
                torch.testing.assert_close(layer.packed(key, merged[key])[module], expected)


def plain_mean(updates, weights):
    weights = np.array(weights) / sum(weights)
    return {
        key: sum(w * u.state[key] for w, u in zip(weights, updates, strict=True))
        for key in updates[0].state
    }


def assert_equal_states(merged, expected):
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_if_everyone_returns_everything_equally_it_is_fedavg(state, layers, update_of, weighting):
    updates = [update_of(device, num_examples=7) for device in range(3)]
    merged = merge(state, updates, layers, weighting=weighting)
    assert_equal_states(merged, plain_mean(updates, [1, 1, 1]))


def test_with_equal_importance_it_is_fedavg_weighted_by_examples(state, layers, update_of):
    examples = [10, 300, 45]
    updates = [update_of(device, num_examples=n) for device, n in enumerate(examples)]
    assert_equal_states(merge(state, updates, layers), plain_mean(updates, examples))


def test_weighting_says_what_a_module_is_weighed_by(state, layers, update_of):
    skewed = {name: np.array([0.7, 0.1, 0.1, 0.1]) for name in EVERYTHING}
    updates = [update_of(0, num_examples=10), update_of(1, importance=skewed, num_examples=30)]
    layer = layers[0]

    def share_of_the_second(weighting):
        first, second = (layer.packed("0.weight", u.state["0.weight"])[0] for u in updates)
        merged = layer.packed(
            "0.weight", merge(state, updates, layers, weighting=weighting)["0.weight"]
        )
        return float(((merged[0] - first) / (second - first)).mean())

    assert share_of_the_second("importance") == pytest.approx(0.7 / 0.95, rel=1e-3)
    assert share_of_the_second("examples") == pytest.approx(30 / 40, rel=1e-3)
    both = 0.7 * 30 / (0.7 * 30 + 0.25 * 10)
    assert share_of_the_second("importance-examples") == pytest.approx(both, rel=1e-3)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_shared_part_is_weighed_by_examples(state, layers, update_of, weighting):
    skewed = {name: np.array([0.7, 0.1, 0.1, 0.1]) for name in EVERYTHING}
    updates = [update_of(0, num_examples=10), update_of(1, importance=skewed, num_examples=30)]
    merged = merge(state, updates, layers, weighting=weighting)
    expected = plain_mean(updates, [10, 30])
    shared = set(state) - {key for layer in layers for key in layer.axes}
    assert shared == {"3.bias", "7.bias", "1.num_batches_tracked"}
    assert_equal_states(merged, {key: expected[key] for key in ("3.bias", "7.bias")})


@given(data=st.data(), weighting=st.sampled_from(WEIGHTINGS))
def test_one_update_is_taken_as_it_is(model, state, layers, update_of, data, weighting):
    update = draw_updates(data, update_of)[0]
    merged = merge(state, [update], layers, weighting=weighting)
    for key, tensor in update.state.items():
        layer = next((layer for layer in layers if key in layer.axes), None)
        got = layer.take(key, merged[key], update.selection[layer.name]) if layer else merged[key]
        assert torch.equal(got, tensor)


def test_no_update_changes_nothing(state, layers):
    merged = merge(state, [], layers)
    assert all(merged[key] is tensor for key, tensor in state.items())


def test_the_state_before_is_left_as_it_is(state, layers, update_of):
    before = {key: tensor.clone() for key, tensor in state.items()}
    merged = merge(state, [update_of(0), update_of(1)], layers)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())
    assert not any(torch.equal(merged[key], before[key]) for key in update_of(0).state)


def test_counts_stay_the_clouds(state, layers, update_of):
    merged = merge(state, [update_of(0), update_of(1)], layers)
    assert merged["1.num_batches_tracked"] is state["1.num_batches_tracked"]
    assert merged["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_modules_of_no_importance_to_any_holder_get_the_plain_mean(
    state, layers, update_of, weighting
):
    nothing = {name: np.zeros(MODULES) for name in EVERYTHING}
    updates = [update_of(device, importance=nothing, num_examples=5) for device in range(2)]
    merged = merge(state, updates, layers, weighting=weighting)
    assert_equal_states(merged, plain_mean(updates, [1, 1]))


def test_an_unknown_weighting_is_refused(state, layers, update_of):
    with pytest.raises(ValueError, match=r"'importance-examples'.*got 'loss'"):
        merge(state, [update_of(0)], layers, weighting="loss")


def test_the_merged_state_loads_into_the_cloud_model(model, state, layers, update_of, small_mlp):
    merged = merge(state, [update_of(0, selection={"0": (1,), "1": (0, 3)})], layers)
    small_mlp().load_state_dict(merged, strict=True)
