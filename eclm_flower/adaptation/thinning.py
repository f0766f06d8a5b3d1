"""Which modules a device goes on with when its budget falls: the others leave one by one.

Greedy, because a device decides in the middle of training: the search of `derive` takes several
milliseconds for a deep model, this takes about one.
"""

from __future__ import annotations

import numpy as np

from eclm_flower.adaptation.derivation import check_affordable
from eclm_flower.adaptation.profile import Budget, Importance
from eclm_flower.modular.costs import RESOURCES, CostTable
from eclm_flower.modular.selection import Selection


def thin_out(
    held: Selection, importance: Importance, costs: CostTable, budget: Budget
) -> dict[str, tuple[int, ...]]:
    """Choose the modules to go on with: the least important for what they cost leave first.

    Parameters
    ----------
    held : dict[str, sequence of int]
        The modules to choose from.
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
    names = list(held)
    # Modules of a layer cost the same, so each layer keeps its most important: a prefix of these.
    ranked = [
        sorted(held[name], key=lambda module, name=name: (-importance[name][module], module))  # type: ignore[misc]
        for name in names
    ]
    value = [importance[name][order] for name, order in zip(names, ranked, strict=True)]
    price = np.array([[getattr(costs.per_module[name], r) for r in RESOURCES] for name in names])
    shared = np.array([getattr(costs.shared, resource) for resource in RESOURCES])
    limit = np.array([getattr(budget, resource) for resource in RESOURCES])

    def chosen(taken: np.ndarray) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(sorted(order[:number]))
            for name, order, number in zip(names, ranked, taken, strict=True)
        }

    def fits(taken: np.ndarray) -> bool:
        """Whether the budget allows it: a quick look, and if that is content, to the last digit."""
        roughly = bool((shared + taken @ price <= limit * (1 + 1e-9)).all())
        return roughly and budget.allows(costs.of(chosen(taken)))

    taken = np.ones(len(names), dtype=int)
    check_affordable(costs.of(chosen(taken)), budget)
    taken = np.array([len(order) for order in ranked])
    left: list[tuple[float, int]] = []
    while not fits(taken):
        spent = shared + taken @ price
        over = spent >= limit * (1 - 1e-9)
        excess = np.maximum(spent - limit, 1e-300)[over]
        relief = np.minimum(price[:, over] / excess, 1).sum(axis=1)
        least = np.array([values[number - 1] for values, number in zip(value, taken, strict=True)])
        worth = np.where(taken > 1, least / np.maximum(relief, 1e-300), np.inf)
        layer = int(worth.argmin())
        taken[layer] -= 1
        left.append((float(least[layer]), layer))
    # One that left late often makes room for others that left before it.
    for _, layer in sorted(left, reverse=True):
        taken[layer] += 1
        if not fits(taken):
            taken[layer] -= 1
    return chosen(taken)
