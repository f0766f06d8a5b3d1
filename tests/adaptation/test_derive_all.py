"""Many devices at once: what each gets alone, near the optimum also in deep models."""

import math

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from eclm_flower.adaptation import Budget, derive
from eclm_flower.adaptation.derivation import derive_all
from eclm_flower.errors import InfeasibleBudgetError
from eclm_flower.modular import RESOURCES, Cost, CostTable


def drawn(rng, layers, modules, devices, concentration):
    """Draw costs, and importances and budgets of devices, some without a limit or too small."""

    def cost():
        return Cost(**dict(zip(RESOURCES, 10 ** rng.uniform(3, 4, 3), strict=True)))

    names = [f"layer{i}" for i in range(layers)]
    costs = CostTable(cost(), {name: cost() for name in names}, dict.fromkeys(names, modules))
    weights = rng.dirichlet(np.full(modules, concentration), (devices, layers))
    importances = [dict(zip(names, own, strict=True)) for own in weights]
    budgets = [
        Budget.share_of(costs, **dict(zip(RESOURCES, rng.uniform(0.15, 1, 3), strict=True)))
        for _ in range(devices)
    ]
    return costs, importances, budgets


def worth(importance, selection):
    return sum(importance[name][list(modules)].sum() for name, modules in selection.items())


def optimum(importance, costs, budget):
    """Return the least upper bound that HiGHS finds in a second."""
    names = [name for name, number in costs.modules.items() for _ in range(number)]
    value = np.concatenate(list(importance.values()))
    forced = np.concatenate([own == own.max() for own in importance.values()])
    price = np.array([[getattr(costs.per_module[name], r) for name in names] for r in RESOURCES])
    free = np.array([getattr(budget, r) - getattr(costs.shared, r) for r in RESOURCES])
    solution = milp(
        -value,
        integrality=np.ones(len(value)),
        bounds=Bounds(forced, 1),
        constraints=LinearConstraint(price / 1e4, -np.inf, free / 1e4),
        options={"mip_rel_gap": 1e-3, "time_limit": 1},
    )
    return -solution.mip_dual_bound


@pytest.mark.parametrize(("layers", "modules"), [(1, 8), (4, 16), (12, 8)])
def test_each_device_gets_what_it_gets_alone(layers, modules):
    rng = np.random.default_rng(layers)
    costs, importances, budgets = drawn(rng, layers, modules, 300, 1.0)  # more than one batch
    budgets[3] = Budget()
    budgets[7] = Budget(memory_bytes=0)
    together = derive_all(importances, costs, budgets)
    assert isinstance(together[7], InfeasibleBudgetError)
    assert set(together[7].missing) == {"memory_bytes"}
    assert together[3] == {name: tuple(range(modules)) for name in costs.modules}
    for i in (0, 1, 2, 3, 100, 255, 256, 299):
        assert derive(importances[i], costs, budgets[i]) == together[i]
    for budget, selection in zip(budgets, together, strict=True):
        if not isinstance(selection, InfeasibleBudgetError):
            assert budget.allows(costs.of(selection))


@pytest.mark.parametrize("concentration", [0.1, 1.0, 100.0])
def test_a_deep_model_comes_within_1_percent_of_the_optimum(concentration):
    rng = np.random.default_rng(0)
    costs, importances, budgets = drawn(rng, 12, 16, 12, concentration)
    shares = [
        worth(importance, selection) / optimum(importance, costs, budget)
        for importance, budget, selection in zip(
            importances, budgets, derive_all(importances, costs, budgets), strict=True
        )
    ]
    assert np.mean(shares) >= 0.995
    assert min(shares) >= 0.99


def test_no_devices_no_selections():
    costs, _, _ = drawn(np.random.default_rng(0), 2, 4, 1, 1.0)
    assert derive_all([], costs, []) == []


def test_resources_that_cost_nothing_or_have_no_limit_do_not_matter():
    free = Cost(communication_bytes=2, computation_flops=0, memory_bytes=1)
    costs = CostTable(free * 0, {"a": free, "b": free}, {"a": 4, "b": 4})
    importance = {"a": np.array([0.4, 0.3, 0.2, 0.1]), "b": np.array([0.7, 0.1, 0.1, 0.1])}
    budget = Budget(communication_bytes=8, computation_flops=0, memory_bytes=math.inf)
    assert derive(importance, costs, budget) == {"a": (0, 1, 2), "b": (0,)}
