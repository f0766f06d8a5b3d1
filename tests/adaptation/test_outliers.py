from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eclm_flower.adaptation import Limits
from eclm_flower.adaptation.outliers import FIRST, LEAST_PEERS, Peers, update_norm
from eclm_flower.adaptation.update import sent


def scaled(update, factor, state, layers):
    """Return an update with its change multiplied."""
    before = dict(sent(update.selection, state, layers))
    changed = {k: before[k] + factor * (t - before[k]) for k, t in update.state.items()}
    return replace(update, state=changed)


def found(updates, state, layers, **limits):
    """Judge the first round of a run with few devices: at its end, by its own median."""
    norms = [update_norm(update, state, layers) for update in updates]
    peers = Peers(Limits(**limits), [])
    for update, norm in zip(updates, norms, strict=True):
        assert peers.join(update, norm) < FIRST
    errors = {u.device: peers.refused(u, norm) for u, norm in zip(updates, norms, strict=True)}
    return {device: error.reason for device, error in errors.items() if error}


def test_the_norm_is_the_root_mean_square_change_of_what_is_held(state, layers, update_of):
    update = update_of(0, selection={"0": (1, 2), "1": (3,)})
    before = dict(sent(update.selection, state, layers))
    change = torch.cat([(update.state[key] - before[key]).flatten() for key in before])
    assert update_norm(update, state, layers) == pytest.approx(float(change.square().mean().sqrt()))
    assert update_norm(scaled(update, -3, state, layers), state, layers) == pytest.approx(
        3 * float(change.square().mean().sqrt()), rel=1e-4
    )


@pytest.mark.parametrize("factor", [30.0, -30.0, 1e30])
def test_a_norm_far_from_the_others_is_found(state, layers, update_of, factor):
    updates = [update_of(device) for device in range(4)]
    assert found(updates, state, layers) == {}
    updates[2] = scaled(updates[2], factor, state, layers)
    assert found(updates, state, layers) == {2: "norm"}
    assert found(updates, state, layers, norm=None) == {}


def test_more_examples_than_the_others_are_found(state, layers, update_of):
    updates = [update_of(device, num_examples=n) for device, n in enumerate([20, 9000, 100, 95])]
    assert found(updates, state, layers) == {}
    updates[1] = replace(updates[1], num_examples=20_000)
    assert found(updates, state, layers) == {1: "examples"}
    assert found(updates, state, layers, examples=None) == {}


def test_few_updates_say_nothing_of_one_of_them(state, layers, update_of):
    updates = [update_of(0), update_of(1), scaled(update_of(2), 1e6, state, layers)]
    assert found(updates, state, layers) == {}


def test_where_most_return_what_they_got_a_change_is_not_suspicious(state, layers, update_of):
    updates = [scaled(update_of(device), 0, state, layers) for device in range(4)]
    assert found([*updates, update_of(9)], state, layers) == {}


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=4), st.integers(0, 4))
def test_a_minority_never_gets_others_refused(state, layers, update_of, factors, more):
    """Whatever up to half of the devices return."""
    honest = [update_of(device) for device in range(len(factors) + more)]
    hostile = [
        scaled(update_of(100 + number), factor, state, layers)
        for number, factor in enumerate(factors)
    ]
    assert set(found(honest + hostile, state, layers)) <= set(range(100, 104))


@pytest.mark.parametrize("wrong", [{"norm": 1.0}, {"norm": float("nan")}, {"examples": 0.5}])
def test_limits_that_refuse_the_median_are_refused(wrong):
    with pytest.raises(ValueError, match="above 1 or None"):
        Limits(**wrong)


class Claim:
    """What of an update is compared, without its tensors."""

    def __init__(self, num_examples):
        self.num_examples = num_examples


def refused_when_all_wait(claims, norm, examples):
    """Which of a round's (norm, examples) are refused if nothing is decided before its end."""
    if len(claims) < LEAST_PEERS:
        return set()
    usual_norm, usual_examples = np.median(claims, axis=0)
    return {
        number
        for number, (own_norm, own_examples) in enumerate(claims)
        if own_examples > examples * usual_examples
        or (usual_norm > 0 and own_norm > norm * usual_norm)
    }


def judged(claims, earlier, limits):
    """Which of a round's claims wait for its end, and which are refused then."""
    peers = Peers(limits, earlier)
    updates = [(Claim(examples), norm) for norm, examples in claims]
    waiting: set[int] = set()
    for number, update in enumerate(updates):
        known = peers.join(*update)
        waiting.add(number)
        if known >= FIRST:
            new = waiting if known == FIRST else {number}
            waiting -= {one for one in new if peers.usual(*updates[one])}
    return waiting, {number for number in waiting if peers.refused(*updates[number])}


claims = st.tuples(
    st.sampled_from([0.0, 0.01, 1.0, 2.0, 30.0, 1e6]), st.sampled_from([1.0, 20.0, 50.0, 9000.0])
)


@given(st.lists(claims, max_size=30), st.lists(claims, max_size=70))
def test_it_is_never_stricter_than_the_median_of_the_round(of_round, earlier):
    limits = Limits()
    waiting, refused = judged(of_round, earlier, limits)
    # Exactly those are refused that the round's median refuses and that had to wait for it.
    assert refused == waiting & refused_when_all_wait(of_round, limits.norm, limits.examples)


@given(st.lists(claims, max_size=FIRST - 1))
def test_where_few_are_known_the_median_of_the_round_alone_decides(of_round):
    waiting, refused = judged(of_round, [], Limits())
    assert waiting == set(range(len(of_round)))
    assert refused == refused_when_all_wait(of_round, 10, 100)


@pytest.mark.parametrize("jump", [50.0, 1e6])
def test_a_jump_of_all_norms_waits_and_is_accepted(jump):
    waiting, refused = judged([(jump, 20.0)] * 8, [(1.0, 20.0)] * 64, Limits())
    assert waiting == set(range(8))
    assert not refused


def test_with_enough_known_only_those_beyond_the_limits_wait():
    of_round = [(1.5, 20.0), (50.0, 20.0), (0.5, 40.0), (1.0, 9000.0), (9.0, 20.0)]
    waiting, refused = judged(of_round, [(1.0, 20.0)] * FIRST, Limits())
    assert waiting == refused == {1, 3}


def test_what_is_known_grows_with_the_round_itself():
    peers = Peers(Limits(), [(1.0, 20.0)] * 3)
    assert [peers.join(Claim(20.0), 1.0) for _ in range(4)] == [4, 5, 6, 7]
    assert judged([(1.0, 20.0)] * (FIRST - 1), [], Limits()) == (set(range(FIRST - 1)), set())
    assert judged([(1.0, 20.0)] * FIRST, [], Limits()) == (set(), set())


def test_limits_switched_off_make_nobody_wait_who_is_beyond_them():
    off = Limits(norm=None, examples=None)
    waiting, _ = judged([(1e6, 20.0), (1.0, 1e6)], [(1.0, 20.0)] * FIRST, off)
    assert not waiting


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_the_norm_of_broken_or_huge_values_is_not_finite(state, layers, update_of, value):
    update = update_of(0)
    broken = {**update.state, "7.bias": update.state["7.bias"].clone()}
    broken["7.bias"][0] = value
    assert np.isfinite(update_norm(update, state, layers))
    with np.errstate(over="ignore"):
        assert not np.isfinite(update_norm(replace(update, state=broken), state, layers))
