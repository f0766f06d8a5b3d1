"""Which modules specialise in which sub-task: the assignment program (paper section 4.3).

``max over M in {0,1} of sum(H * M)  s.t.  sum_t M_tn <= kappa1,  sum_n M_tn <= kappa2``, with H the
load of each module on each sub-task, solved exactly by HiGHS. Core modules, which the paper does
not have, are assigned to every sub-task first and are exempt from kappa1.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import eye_array, kron

from eclm_flower.errors import PrototypingError


def assign(
    load: np.ndarray, *, sub_tasks_per_module: int, modules_per_sub_task: int, core: int = 0
) -> np.ndarray:
    """Assign modules to sub-tasks so that the assigned load is largest.

    Parameters
    ----------
    load : np.ndarray
        ``[T, N]``, non-negative: load of module n on sub-task t.
    sub_tasks_per_module : int
        kappa1: most sub-tasks a module serves (core modules serve all).
    modules_per_sub_task : int
        kappa2: most modules of a sub-task, core ones included.
    core : int (default: 0)
        The first `core` modules are assigned to every sub-task.

    Returns
    -------
    np.ndarray
        bool ``[T, N]``.

    Raises
    ------
    PrototypingError
        A parameter is out of range, or some sub-task would get no module.
    """
    sub_tasks, modules = load.shape
    if not 0 <= core <= modules_per_sub_task <= modules:
        raise PrototypingError(
            "Expected 0 <= core modules <= modules_per_sub_task <= modules per layer, got "
            f"{core}, {modules_per_sub_task}, {modules}."
        )
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise PrototypingError("Expected finite, non-negative loads.")
    free = modules - core
    per_sub_task = modules_per_sub_task - core
    if core == 0 and (per_sub_task < 1 or free * sub_tasks_per_module < sub_tasks):
        raise PrototypingError(
            f"{free} modules serving {sub_tasks_per_module} sub-tasks each can't give each of "
            f"{sub_tasks} sub-tasks a module; raise sub_tasks_per_module to at least "
            f"{-(-sub_tasks // free)}."
        )
    assignment = np.zeros(load.shape, dtype=bool)
    assignment[:, :core] = True
    if free == 0 or per_sub_task == 0:
        return assignment

    each_module = kron(np.ones((1, sub_tasks)), eye_array(free))  # sums over t, for every n
    each_sub_task = kron(eye_array(sub_tasks), np.ones((1, free)))  # sums over n, for every t
    solution = milp(
        -load[:, core:].ravel(),
        integrality=np.ones(sub_tasks * free, dtype=int),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(each_module, -np.inf, sub_tasks_per_module),
            LinearConstraint(each_sub_task, 0 if core else 1, per_sub_task),
        ],
    )
    if solution.x is None:
        raise PrototypingError(f"The assignment program has no solution: {solution.message}")
    assignment[:, core:] = np.round(solution.x).reshape(sub_tasks, free).astype(bool)
    return assignment


def gate_targets(
    load: np.ndarray,
    assignment: np.ndarray,
    *,
    core: int = 0,
    core_share: float = 0.0,
    smoothing: float = 0.0,
) -> np.ndarray:
    """Turn an assignment into the gates each sub-task should have: P = H * M, rows normalised.

    Parameters
    ----------
    load : np.ndarray
        H, ``[T, N]``.
    assignment : np.ndarray
        M, bool ``[T, N]``.
    core, core_share : int, float
        The first `core` modules share `core_share` of each row equally (not in the paper).
    smoothing : float (default: 0)
        Share of each row spread over ALL modules by load, so that the modules beyond the assigned
        ones have a meaningful order too (not in the paper).

    Returns
    -------
    np.ndarray
        float64 ``[T, N]``, rows sum to 1.
    """

    def normalised(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
        # Without any load there is nothing to go by: equal among all that may be chosen.
        rows = np.where(rows.sum(axis=1, keepdims=True) > 0, rows, among)
        result: np.ndarray = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-300)
        return result

    chosen = load * assignment
    if core:
        beyond = assignment[:, core:].any(axis=1, keepdims=True)
        share = np.where(beyond, core_share, 1.0)  # a sub-task with core modules only gets them all
        chosen = np.hstack(
            [
                np.broadcast_to(share / core, (len(load), core)),
                (1 - share) * normalised(chosen[:, core:], assignment[:, core:]),
            ]
        )
    own, everywhere = normalised(chosen, assignment), normalised(load, np.ones_like(load))
    return (1 - smoothing) * own + smoothing * everywhere
