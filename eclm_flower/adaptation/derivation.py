"""Which modules a device gets: the most important that fit its budget (paper section 5.2).

``max sum_i Imp_i d_i  s.t.  sum_i Resource_j(i) d_i <= L_j`` for communication, computation and
memory, d binary. The most important module of every layer is forced first; the rest is a
multi-dimensional 0/1 knapsack, solved for many devices at once by `best_counts`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eclm_flower.adaptation.knapsack import best_counts
from eclm_flower.adaptation.profile import Budget, Importance
from eclm_flower.errors import InfeasibleBudgetError
from eclm_flower.modular.costs import RESOURCES, Cost, CostTable

_UNITS = {"communication_bytes": "bytes", "computation_flops": "FLOPs", "memory_bytes": "bytes"}
_TOGETHER = 256  # devices: what they need stays in the processor's cache


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
    (result,) = derive_all([importance], costs, [budget])
    if isinstance(result, InfeasibleBudgetError):
        raise result
    return result


def derive_all(
    importances: Sequence[Importance], costs: CostTable, budgets: Sequence[Budget]
) -> list[dict[str, tuple[int, ...]] | InfeasibleBudgetError]:
    """Choose the modules of many devices: what `derive` chooses for each, sooner.

    Parameters
    ----------
    importances : sequence of dict[str, np.ndarray]
        Of each device: layer name -> ``[N]``, larger matters more.
    costs : CostTable
        The cloud model's costs.
    budgets : sequence of Budget
        Of each device.

    Returns
    -------
    list of dict[str, tuple[int, ...]] or InfeasibleBudgetError
        Of each device: its modules, or why there are none.
    """
    results: list[dict[str, tuple[int, ...]] | InfeasibleBudgetError] = []
    for start in range(0, len(importances), _TOGETHER):
        part = slice(start, start + _TOGETHER)
        results += _derive_some(importances[part], costs, budgets[part])
    return results


def _derive_some(
    importances: Sequence[Importance], costs: CostTable, budgets: Sequence[Budget]
) -> list[dict[str, tuple[int, ...]] | InfeasibleBudgetError]:
    shared = np.array([getattr(costs.shared, resource) for resource in RESOURCES], dtype=float)
    price = np.array(
        [[getattr(costs.per_module[name], r) for r in RESOURCES] for name in costs.modules],
        dtype=float,
    )
    limit = np.array([[getattr(budget, r) for budget in budgets] for r in RESOURCES], dtype=float)
    least = costs.of(dict.fromkeys(costs.modules, (0,)))
    floor = np.array([[getattr(least, resource)] for resource in RESOURCES], dtype=float)
    payable = np.all(floor <= limit, axis=0).tolist()

    devices = [device for device, pays in enumerate(payable) if pays]
    most = max(costs.modules.values())
    value = np.full((most, len(price), len(devices)), -np.inf)
    ranks = []
    for layer, (name, modules) in enumerate(costs.modules.items()):
        own = np.array([importances[i][name] for i in devices], dtype=np.float64).reshape(
            -1, modules
        )
        # Of equals the lower number goes first, so that equal profiles give equal sub-models.
        order = np.argsort(-own, axis=1, kind="stable")
        value[:modules, layer] = np.take_along_axis(own, order, axis=1).T
        ranks.append(np.argsort(order, axis=1))
    counts, _ = best_counts(value, shared, price, limit[:, devices])

    selections: list[dict[str, tuple[int, ...]]] = [{} for _ in devices]
    for name, rank, count in zip(costs.modules, ranks, counts, strict=True):
        chosen = np.nonzero(rank < count[:, None])[1].tolist()
        end = 0
        for selection, number in zip(selections, count.tolist(), strict=True):
            selection[name] = tuple(chosen[end : end + number])
            end += number
    following = iter(selections)
    return [
        next(following) if pays else _refusal(lacking(least, budget))
        for budget, pays in zip(budgets, payable, strict=True)
    ]


def check_affordable(least: Cost, budget: Budget) -> None:
    """Refuse a budget that doesn't pay for the least sub-model there is.

    Raises
    ------
    InfeasibleBudgetError
        It says what is missing of each resource.
    """
    if missing := lacking(least, budget):
        raise _refusal(missing)


def lacking(least: Cost, budget: Budget) -> dict[str, float]:
    """Say how much of which resources a budget lacks for the least sub-model; empty: nothing."""
    return {
        resource: getattr(least, resource) - getattr(budget, resource)
        for resource in RESOURCES
        if getattr(least, resource) > getattr(budget, resource)
    }


def _refusal(missing: dict[str, float]) -> InfeasibleBudgetError:
    lacks = ", ".join(f"{gap:,.0f} {_UNITS[name]} of {name}" for name, gap in missing.items())
    return InfeasibleBudgetError(
        f"The budget is too small for the shared part and one module a layer: {lacks} are "
        "missing. Raise the budget or cut the model into more, smaller modules.",
        missing,
    )
