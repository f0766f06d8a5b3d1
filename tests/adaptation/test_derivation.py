"""Invariant 4: never over budget, a module in every layer, within 1 % of the exact optimum."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from eclm_flower.adaptation import Budget, derive
from eclm_flower.adaptation.derivation import lacking
from eclm_flower.errors import InfeasibleBudgetError
from eclm_flower.modular import RESOURCES, Cost, CostTable


def cost(*values):
    return Cost(**dict(zip(RESOURCES, map(float, values), strict=True)))


def table(shared, per_module, modules):
    return CostTable(
        cost(*shared), {name: cost(*each) for name, each in per_module.items()}, modules
    )


def draw_costs(data):
    unit = data.draw(st.sampled_from([1, 4096]))
    amount = st.one_of(st.integers(1, 20), st.integers(1, 1000)).map(lambda n: unit * n)
    amounts = st.tuples(amount, amount, amount)
    layers = data.draw(st.integers(2, 3))
    return table(
        data.draw(amounts),
        {f"layer{i}": data.draw(amounts) for i in range(layers)},
        {f"layer{i}": data.draw(st.integers(2, 4)) for i in range(layers)},
    )


def draw_importance(data, costs):
    """Distributions of all kinds: peaked, equal, with zeros."""
    importance = {}
    for name, modules in costs.modules.items():
        weights = np.array(
            data.draw(st.lists(st.integers(0, 100), min_size=modules, max_size=modules))
        )
        assume(weights.sum() > 0)
        importance[name] = weights / weights.sum()
    return importance


def draw_budget(data, costs):
    """Budgets that matter: shares, and the very cost of some selection, or a hair below it."""
    if data.draw(st.booleans()):
        shares = {name: data.draw(st.floats(0, 1.2)) for name in RESOURCES}
        return Budget.share_of(costs, **shares)
    counts = {name: range(data.draw(st.integers(1, n))) for name, n in costs.modules.items()}
    limits = {name: getattr(costs.of(counts), name) for name in RESOURCES}
    if data.draw(st.booleans()):
        hair = data.draw(st.sampled_from(RESOURCES))
        limits[hair] = math.nextafter(limits[hair], 0)
    return Budget(**limits)


def value(importance, selection):
    return sum(importance[name][list(modules)].sum() for name, modules in selection.items())


def brute_force(importance, costs, budget):
    """Most importance of all feasible selections with the first module of each layer, or None."""
    per_layer = []
    for name, modules in costs.modules.items():
        first = int(np.argmax(importance[name]))
        others = [module for module in range(modules) if module != first]
        subsets = itertools.chain.from_iterable(
            itertools.combinations(others, size) for size in range(modules)
        )
        per_layer.append([(name, (first, *subset)) for subset in subsets])
    selections = map(dict, itertools.product(*per_layer))
    feasible = [value(importance, s) for s in selections if budget.allows(costs.of(s))]
    return max(feasible, default=None)


@settings(max_examples=200)
@given(data=st.data())
def test_a_derived_selection_fits_and_is_as_good_as_the_best(data):
    costs = draw_costs(data)
    importance = draw_importance(data, costs)
    budget = draw_budget(data, costs)
    best = brute_force(importance, costs, budget)
    if best is None:
        with pytest.raises(InfeasibleBudgetError):
            derive(importance, costs, budget)
        return
    selection = derive(importance, costs, budget)
    assert list(selection) == list(costs.modules)
    assert budget.allows(costs.of(selection))
    assert value(importance, selection) >= 0.99 * best
    for name, modules in selection.items():
        assert int(np.argmax(importance[name])) in modules
        assert list(modules) == sorted(set(modules))
        assert set(modules) <= set(range(costs.modules[name]))
        assert all(type(module) is int for module in modules)


@settings(max_examples=100)
@given(data=st.data())
def test_nothing_that_still_fits_is_left_behind(data):
    costs = draw_costs(data)
    importance = draw_importance(data, costs)
    budget = draw_budget(data, costs)
    assume(brute_force(importance, costs, budget) is not None)
    selection = derive(importance, costs, budget)
    for name, modules in costs.modules.items():
        for module in set(range(modules)) - set(selection[name]):
            assert not budget.allows(costs.of({**selection, name: (*selection[name], module)}))


@settings(max_examples=50)
@given(data=st.data())
def test_in_a_layer_the_more_important_goes_first_and_ties_to_the_lower_number(data):
    costs = draw_costs(data)
    importance = draw_importance(data, costs)
    budget = draw_budget(data, costs)
    assume(brute_force(importance, costs, budget) is not None)
    selection = derive(importance, costs, budget)
    assert derive(importance, costs, budget) == selection
    for name, modules in selection.items():
        by_rank = sorted(range(costs.modules[name]), key=lambda m: (-importance[name][m], m))
        assert set(modules) == set(by_rank[: len(modules)])


EQUAL = table((0, 0, 0), {"a": (10, 1, 1), "b": (10, 1, 1)}, {"a": 3, "b": 3})
IMPORTANCE = {"a": np.array([0.2, 0.5, 0.3]), "b": np.array([0.9, 0.1, 0.0])}


def test_an_infinite_budget_gets_everything():
    assert derive(IMPORTANCE, EQUAL, Budget()) == {"a": (0, 1, 2), "b": (0, 1, 2)}


def test_what_matters_most_is_taken_across_layers():
    selection = derive(IMPORTANCE, EQUAL, Budget(communication_bytes=40))
    assert selection == {"a": (0, 1, 2), "b": (0,)}


def test_the_most_important_of_each_layer_is_forced():
    """Even where the same bytes would buy more importance in another layer."""
    importance = {"a": np.array([0.5, 0.5, 0.0]), "b": np.array([0.34, 0.33, 0.33])}
    costs = table((0, 0, 0), {"a": (10, 0, 0), "b": (30, 0, 0)}, {"a": 3, "b": 3})
    selection = derive(importance, costs, Budget(communication_bytes=40))
    assert selection == {"a": (0,), "b": (0,)}


@pytest.mark.parametrize("resource", RESOURCES)
def test_every_resource_limits(resource):
    costs = table((0, 0, 0), {"a": (1, 1, 1)}, {"a": 4})
    selection = derive({"a": np.full(4, 0.25)}, costs, Budget(**{resource: 2.0}))
    assert selection == {"a": (0, 1)}


def test_a_module_of_no_importance_is_taken_when_it_is_free_to_take():
    costs = table((5, 0, 0), {"a": (1, 1, 1), "b": (2, 1, 1)}, {"a": 2, "b": 3})
    importance = {"a": np.array([1.0, 0.0]), "b": np.array([1.0, 0.0, 0.0])}
    assert derive(importance, costs, Budget(communication_bytes=9)) == {"a": (0, 1), "b": (0,)}
    assert derive(importance, costs, Budget(communication_bytes=11)) == {"a": (0, 1), "b": (0, 1)}


@given(importance=st.lists(st.integers(1, 9), min_size=4, max_size=4), modules=st.integers(1, 3))
@example(importance=[1, 1, 1, 1], modules=2)
def test_a_budget_short_by_a_hair_does_not_stretch(importance, modules):
    """The solver's tolerance would let one more module through."""
    costs = table((0, 0, 0), {"a": (1000, 1, 1)}, {"a": 4})
    budget = Budget(communication_bytes=math.nextafter(1000.0 * (modules + 1), 0))
    selection = derive({"a": np.array(importance) / sum(importance)}, costs, budget)
    assert len(selection["a"]) == modules


def test_a_budget_short_by_a_hair_still_gets_the_best_that_fits():
    """Not what is left of a selection that the solver's tolerance let through."""
    costs = table((0, 0, 0), {"a": (100, 1, 1), "b": (40, 1, 1)}, {"a": 2, "b": 4})
    importance = {"a": np.array([0.6, 0.4]), "b": np.array([0.52, 0.16, 0.16, 0.16])}
    enough = derive(importance, costs, Budget(communication_bytes=280))
    assert enough == {"a": (0, 1), "b": (0, 1)}
    short = derive(importance, costs, Budget(communication_bytes=math.nextafter(280, 0)))
    assert short == {"a": (0,), "b": (0, 1, 2, 3)}


def test_what_is_lacking_is_named_and_nothing_else():
    costs = table((100, 50, 30), {"a": (10, 20, 30), "b": (1, 2, 3)}, {"a": 2, "b": 2})
    importance = {"a": np.array([0.4, 0.6]), "b": np.array([0.5, 0.5])}
    budget = Budget(communication_bytes=101, computation_flops=72, memory_bytes=0)
    with pytest.raises(InfeasibleBudgetError) as caught:
        derive(importance, costs, budget)
    assert caught.value.missing == {"communication_bytes": 10, "memory_bytes": 63}
    assert "10 bytes of communication_bytes, 63 bytes of memory_bytes" in str(caught.value)
    assert lacking(cost(111, 72, 63), budget) == caught.value.missing
    assert not lacking(cost(101, 72, 0), budget)


def test_the_least_feasible_budget_buys_one_module_a_layer():
    costs = table((100, 50, 30), {"a": (10, 20, 30), "b": (1, 2, 3)}, {"a": 2, "b": 2})
    importance = {"a": np.array([0.4, 0.6]), "b": np.array([0.5, 0.5])}
    budget = Budget(communication_bytes=111, computation_flops=72, memory_bytes=63)
    assert derive(importance, costs, budget) == {"a": (1,), "b": (0,)}
