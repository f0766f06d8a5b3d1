import pytest
from unequal_federation import run

from strategies import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


def test_uniform_merging_weighs_by_examples_alone():
    strategy, _ = run(METHODS["eclm-uniform-merge"], rounds=1)
    assert (strategy.weighting, strategy.uses_importance) == ("examples", True)
    whole, _ = run(METHODS["eclm"], rounds=1)
    assert strategy.selections == whole.selections
    assert METHODS["eclm-uniform-merge"].offline == METHODS["eclm-chosen"].offline


def test_fixed_deltas_stay():
    strategy, _ = run(METHODS["eclm-fixed-deltas"], rounds=1)
    assert strategy.delta_step == 0 < run(METHODS["eclm"], rounds=1)[0].delta_step
    assert METHODS["eclm-fixed-deltas"].offline == METHODS["eclm"].offline


def test_born_deltas_start_blank():
    assert METHODS["eclm-born-deltas"].offline == "blank"
    assert METHODS["eclm-born-deltas"].strategy is METHODS["eclm"].strategy


def test_without_importance_devices_of_equal_budgets_get_equal_modules():
    whole, _ = run(METHODS["eclm"], rounds=1)
    without, _ = run(METHODS["eclm-no-importance"], rounds=1)
    assert METHODS["eclm-no-importance"].offline == METHODS["eclm"].offline
    assert all(modules[0] == 0 for held in without.selections.values() for modules in held.values())
    assert any(modules[0] > 0 for held in whole.selections.values() for modules in held.values())


def test_without_ability_enhancing_the_cloud_never_trained_sub_models():
    assert METHODS["eclm-no-enhancing"].offline == "split"
    assert METHODS["eclm-no-enhancing"].strategy is METHODS["eclm"].strategy
