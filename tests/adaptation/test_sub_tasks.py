"""Inferring what sub-tasks a device's data comes from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eclm_flower.adaptation.sub_tasks import (
    mixture_from_importance,
    mixture_from_label_counts,
    mixture_from_losses,
)

counts = st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(sum)


@given(counts)
def test_labels_are_the_mixture_where_sub_tasks_are_labels(device):
    mixture = mixture_from_label_counts(np.array(device), 30 * np.eye(4))
    np.testing.assert_allclose(mixture, np.array(device) / sum(device))


@given(counts)
def test_labels_say_nothing_where_all_sub_tasks_have_the_same(device):
    mixture = mixture_from_label_counts(np.array(device), np.tile([10, 20, 5, 5], (3, 1)))
    np.testing.assert_allclose(mixture, 1 / 3)


def test_a_class_is_shared_by_the_sub_tasks_that_have_it():
    proxy = np.array([[10, 10, 0], [0, 30, 0]])  # in the second one, class 1 is twice as frequent
    np.testing.assert_allclose(mixture_from_label_counts([0, 4, 0], proxy), [1 / 3, 2 / 3])
    np.testing.assert_allclose(mixture_from_label_counts([4, 0, 0], proxy), [1, 0])
    np.testing.assert_allclose(mixture_from_label_counts([0, 0, 4], proxy), [1 / 2, 1 / 2])


@pytest.mark.parametrize("device", [[0, 0, 0], [1, 2]])
def test_label_counts_that_make_no_sense_are_refused(device):
    with pytest.raises(ValueError, match="counts of 3 classes"):
        mixture_from_label_counts(device, np.ones((2, 3)))


def gates(rng, sub_tasks, modules):
    return rng.dirichlet(np.full(modules, 0.3), sub_tasks)


@given(st.integers(0, 1000), st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(sum))
def test_importance_tells_in_what_proportions_sub_tasks_were_mixed(seed, parts):
    rng = np.random.default_rng(seed)
    known = {"a": gates(rng, 3, 8), "b": gates(rng, 3, 6)}
    mixture = np.array(parts) / sum(parts)
    importance = {name: mixture @ rows for name, rows in known.items()}
    np.testing.assert_allclose(mixture_from_importance(importance, known), mixture, atol=1e-3)


def test_equal_sub_tasks_get_equal_parts():
    rows = np.array([[0.7, 0.3], [0.7, 0.3], [0.1, 0.9]])
    mixture = mixture_from_importance({"a": np.array([0.7, 0.3])}, {"a": rows})
    np.testing.assert_allclose(mixture, [0.5, 0.5, 0], atol=1e-3)


def test_noise_leaves_a_proper_mixture():
    rng = np.random.default_rng(0)
    known = {"a": gates(rng, 8, 16)}
    for sub_task in range(8):
        noisy = {"a": known["a"][sub_task] + rng.normal(0, 0.01, 16)}
        mixture = mixture_from_importance(noisy, known)
        assert mixture.sum() == pytest.approx(1)
        assert (mixture >= 0).all()
        assert mixture.argmax() == sub_task


def test_importance_of_another_model_is_refused():
    with pytest.raises(ValueError, match="importance of 4 modules, got 3"):
        mixture_from_importance({"a": np.ones(3) / 3}, {"a": np.ones((2, 4)) / 4})


@given(st.lists(st.floats(0, 20), min_size=1, max_size=8), st.integers(0, 10_000))
def test_losses_give_a_mixture_that_favours_the_least(losses, samples):
    mixture = mixture_from_losses(losses, samples)
    assert mixture.sum() == pytest.approx(1)
    assert mixture[np.argmin(losses)] == mixture.max()


def test_more_samples_make_surer():
    one, many = (mixture_from_losses([0.5, 0.6], samples) for samples in (1, 100))
    np.testing.assert_allclose(one, np.exp([0.1, 0]) / np.exp([0.1, 0]).sum())
    assert many[0] > 0.9999
    np.testing.assert_allclose(mixture_from_losses([0.5, 0.6], 0), 0.5)
