import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclm_flower.errors import PrototypingError
from eclm_flower.prototyping import assign, gate_targets

loads = st.tuples(st.integers(1, 3), st.integers(1, 4)).flatmap(
    lambda shape: st.lists(
        st.lists(st.just(0.0) | st.floats(1e-3, 10), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    ).map(np.array)
)


def all_assignments(sub_tasks, modules):
    cells = itertools.product([False, True], repeat=sub_tasks * modules)
    return np.array(list(cells)).reshape(-1, sub_tasks, modules)


def feasible(assignments, per_module, per_sub_task, core):
    """Which of ``[A, T, N]`` keep the constraints."""
    own = assignments[:, :, core:]
    ok = assignments[:, :, :core].all(axis=(1, 2))
    ok &= (own.sum(axis=1) <= per_module).all(axis=1)
    ok &= (assignments.sum(axis=2) <= per_sub_task).all(axis=1)
    return ok & assignments.any(axis=2).all(axis=1)


@settings(max_examples=150)
@given(load=loads, data=st.data())
def test_an_assignment_is_the_best_of_all(load, data):
    sub_tasks, modules = load.shape
    kappa2 = data.draw(st.integers(1, modules))
    core = data.draw(st.integers(0, kappa2))
    kappa1 = data.draw(st.integers(1, sub_tasks))
    candidates = all_assignments(sub_tasks, modules)
    candidates = candidates[feasible(candidates, kappa1, kappa2, core)]

    def solve():
        return assign(load, sub_tasks_per_module=kappa1, modules_per_sub_task=kappa2, core=core)

    if not len(candidates):
        with pytest.raises(PrototypingError):
            solve()
        return
    assignment = solve()
    assert assignment.dtype == bool
    assert feasible(assignment[None], kappa1, kappa2, core).all()
    best = (load * candidates).sum(axis=(1, 2)).max()
    assert (load * assignment).sum() == pytest.approx(best)


def test_the_assigned_load_is_largest():
    load = np.array([[9, 8, 0], [7, 1, 0]])  # greedy would give the first sub-task module 0
    assignment = assign(load, sub_tasks_per_module=1, modules_per_sub_task=1)
    assert assignment.astype(int).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_core_modules_serve_every_sub_task():
    load = np.array([[0.0, 5, 1], [0, 9, 1], [0, 1, 1]])
    assignment = assign(load, sub_tasks_per_module=1, modules_per_sub_task=2, core=1)
    assert assignment[:, 0].all()
    assert assignment[:, 1].tolist() == [False, True, False]
    assert assign(load, sub_tasks_per_module=1, modules_per_sub_task=1, core=1)[:, 1:].sum() == 0
    assert assign(load, sub_tasks_per_module=1, modules_per_sub_task=3, core=3).all()


@pytest.mark.parametrize(
    ("load", "parameters", "problem"),
    [
        (np.ones((5, 2)), {"sub_tasks_per_module": 2}, "to at least 3"),
        (np.ones((2, 2)), {"modules_per_sub_task": 3}, "got 0, 3, 2"),
        (np.ones((2, 2)), {"core": 2}, "core modules <= modules_per_sub_task"),
        (np.ones((2, 2)), {"core": -1}, "0 <= core modules"),
        (np.array([[1, np.nan]]), {}, "finite, non-negative"),
        (np.array([[1, np.inf]]), {}, "finite, non-negative"),
        (np.array([[1, -1.0]]), {}, "finite, non-negative"),
    ],
)
def test_impossible_parameters_are_refused(load, parameters, problem):
    defaults = {"sub_tasks_per_module": 1, "modules_per_sub_task": 1}
    with pytest.raises(PrototypingError, match=problem):
        assign(load, **{**defaults, **parameters})


@settings(max_examples=150)
@given(load=loads, data=st.data())
def test_gate_targets_are_distributions_over_the_assigned_modules(load, data):
    sub_tasks, modules = load.shape
    core = data.draw(st.integers(0, modules))
    core_share = data.draw(st.floats(0, 1))
    assignment = np.array(
        [[n < core or data.draw(st.booleans()) for n in range(modules)] for _ in range(sub_tasks)]
    )
    if not core:
        assignment[:, 0] = True
    targets = gate_targets(load, assignment, core=core, core_share=core_share)
    assert targets.shape == load.shape
    np.testing.assert_allclose(targets.sum(axis=1), 1)
    assert (targets >= 0).all()
    assert (targets[~assignment] == 0).all()
    own = assignment[:, core:].any(axis=1)
    if core:
        np.testing.assert_allclose(targets[own, :core], core_share / core)
        np.testing.assert_allclose(targets[~own, :core], 1 / core)

    smoothing = data.draw(st.floats(0, 1))
    smoothed = gate_targets(load, assignment, core=core, core_share=core_share, smoothing=smoothing)
    np.testing.assert_allclose(smoothed.sum(axis=1), 1)
    by_load = np.where(load.sum(axis=1, keepdims=True) > 0, load, 1)
    by_load = by_load / by_load.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(smoothed, (1 - smoothing) * targets + smoothing * by_load)


def test_gate_targets_are_the_assigned_load_normalised():
    """The paper's P = H * M."""
    load = np.array([[3.0, 1, 4], [2, 2, 0]])
    assignment = np.array([[True, True, False], [False, True, True]])
    np.testing.assert_allclose(gate_targets(load, assignment), [[0.75, 0.25, 0], [0, 1, 0]])


def test_assigned_modules_without_load_share_equally():
    load = np.array([[0.0, 0, 5]])
    assignment = np.array([[True, True, False]])
    np.testing.assert_allclose(gate_targets(load, assignment), [[0.5, 0.5, 0]])
    np.testing.assert_allclose(
        gate_targets(load, assignment, core=1, core_share=0.6), [[0.6, 0.4, 0]]
    )
