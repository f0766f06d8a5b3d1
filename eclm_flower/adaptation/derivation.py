"""Which modules a device gets: the most important that fit its budget (paper section 5.2).

``max sum_i Imp_i d_i  s.t.  sum_i Resource_j(i) d_i <= L_j`` for communication, computation and
memory, d binary. The most important module of every layer is forced first; the rest is a
multi-dimensional 0/1 knapsack, solved exactly by HiGHS.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from eclm_flower.adaptation.profile import Budget, Importance
from eclm_flower.errors import InfeasibleBudgetError
from eclm_flower.modular.costs import RESOURCES, CostTable

_UNITS = {"communication_bytes": "bytes", "computation_flops": "FLOPs", "memory_bytes": "bytes"}


def derive(importance: Importance, costs: CostTable, budget: Budget) -> dict[str, tuple[int, ...]]:
    """Choose a device's modules.

    Parameters
    ----------
    importance : dict[str, np.ndarray]
        Layer name -> ``[N]``, larger matters more.
    costs : CostTable
        The cloud model's costs.
    budget : Budget
        What the device can spend on shared part and modules together.

    Returns
    -------
    dict[str, tuple[int, ...]]
        Layer name -> modules, ascending; at least one a layer.

    Raises
    ------
    InfeasibleBudgetError
        The budget doesn't pay for the shared part and the most important module of every layer.
    """
    if budget.allows(costs.whole):
        return {name: tuple(range(number)) for name, number in costs.modules.items()}

    first = {name: int(np.argmax(importance[name])) for name in costs.modules}
    least = costs.of({name: (module,) for name, module in first.items()})
    missing = {
        resource: getattr(least, resource) - getattr(budget, resource)
        for resource in RESOURCES
        if getattr(least, resource) > getattr(budget, resource)
    }
    if missing:
        lacks = ", ".join(f"{gap:,.0f} {_UNITS[name]} of {name}" for name, gap in missing.items())
        raise InfeasibleBudgetError(
            f"The budget is too small for the shared part and one module a layer: {lacks} are "
            "missing. Raise the budget or cut the model into more, smaller modules.",
            missing,
        )

    modules = [(name, number) for name, total in costs.modules.items() for number in range(total)]
    value = np.array([importance[name][number] for name, number in modules])
    forced = np.array([float(first[name] == number) for name, number in modules])
    price, limit = [], []
    for resource in RESOURCES:
        free = getattr(budget, resource) - getattr(costs.shared, resource)
        if np.isfinite(free):
            row = np.array([getattr(costs.per_module[name], resource) for name, _ in modules])
            scale = max(row.max(), 1.0)  # HiGHS is at its best with numbers near 1
            price.append(row / scale)
            limit.append(free / scale)
    # Even a module of no importance is worth having if it is free to take, and ties go to the
    # lower number, so that equal profiles give equal sub-models.
    value = value + 1e-9 * (1 + np.arange(len(value), 0, -1) / len(value))
    solution = milp(
        -value,
        integrality=np.ones(len(value)),
        bounds=Bounds(forced, 1),
        constraints=LinearConstraint(np.array(price), -np.inf, np.array(limit)),
        options={"mip_rel_gap": 1e-4},
    )
    chosen = forced if solution.x is None else np.round(solution.x)
    result: dict[str, list[int]] = {name: [] for name in costs.modules}
    for (name, number), taken in zip(modules, chosen, strict=True):
        if taken:
            result[name].append(number)
    # The solver works to a tolerance; the budget does not. Give back the least that mattered.
    while not budget.allows(costs.of(result)):
        _, name, number = min(
            (importance[name][number], name, number)
            for name, numbers in result.items()
            for number in numbers
            if number != first[name]
        )
        result[name].remove(number)
    return {name: tuple(numbers) for name, numbers in result.items()}
