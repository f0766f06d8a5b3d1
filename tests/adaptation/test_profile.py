import math

import pytest

from eclm_flower.adaptation import Budget, DeviceProfile
from eclm_flower.modular import RESOURCES, Cost, CostTable


def cost(*values):
    return Cost(**dict(zip(RESOURCES, values, strict=True)))


COSTS = CostTable(
    shared=cost(100.0, 10.0, 1.0),
    per_module={"a": cost(10.0, 20.0, 30.0), "b": cost(1.0, 2.0, 3.0)},
    modules={"a": 4, "b": 10},
)


@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("value", [-1.0, math.nan, -math.inf])
def test_a_budget_is_a_number_from_0(resource, value):
    with pytest.raises(ValueError, match=f"{resource} of a budget to be >= 0, got {value}"):
        Budget(**{resource: value})


def test_a_budget_is_unlimited_where_nothing_is_said():
    assert Budget().allows(cost(1e300, 1e300, 1e300))
    assert DeviceProfile(device=3).budget == Budget()
    assert not DeviceProfile(device=3).importance


@pytest.mark.parametrize("resource", RESOURCES)
def test_a_budget_allows_what_it_can_pay_in_every_resource(resource):
    budget = Budget(communication_bytes=5, computation_flops=5, memory_bytes=5)
    assert budget.allows(cost(5, 5, 5))
    assert not budget.allows(cost(5, 5, 5) + Cost(**{**dict.fromkeys(RESOURCES, 0), resource: 1}))


def test_a_share_pays_for_the_shared_part_and_that_share_of_the_modules():
    budget = Budget.share_of(COSTS, communication_bytes=0.5, memory_bytes=0.0)
    assert budget.communication_bytes == 100 + 0.5 * (4 * 10 + 10 * 1)
    assert budget.memory_bytes == 1
    assert budget.computation_flops == math.inf


def test_the_whole_share_is_the_whole_model():
    budget = Budget.share_of(COSTS, **dict.fromkeys(RESOURCES, 1.0))
    assert all(getattr(budget, name) == getattr(COSTS.whole, name) for name in RESOURCES)


def test_a_share_of_an_unknown_resource_is_refused():
    with pytest.raises(ValueError, match=r"got \['battery'\]"):
        Budget.share_of(COSTS, battery=0.5)


def test_the_cost_of_a_selection_adds_up():
    assert COSTS.of({"a": (0, 3), "b": (7,)}) == cost(121.0, 52.0, 64.0)
    assert COSTS.whole == cost(150.0, 110.0, 151.0)
