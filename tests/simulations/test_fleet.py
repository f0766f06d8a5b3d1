"""The fleet follows the published statistics, and its scarcest resource matches the paper's."""

import numpy as np
import pytest

from simulations.fleet import draw_fleet


def test_shares_are_shares():
    for device in draw_fleet(500, seed=1):
        shares = (device.memory_share, device.computation_share, device.communication_share)
        assert all(0 < share <= 1 for share in shares)
        assert device.memory_share == min(1, device.ram_gb / 12)
        assert device.computation_share == pytest.approx(np.clip(61 / device.latency_ms, 0.1, 1))


def test_ram_and_latency_follow_the_published_statistics():
    fleet = draw_fleet(20000, seed=0)
    ram = np.array([device.ram_gb for device in fleet])
    published = {2: 0.102, 4: 0.327, 6: 0.213, 8: 0.262, 12: 0.093, 16: 0.005}
    assert set(ram) == set(published)
    for size, share in published.items():
        assert np.mean(ram == size) == pytest.approx(share, abs=0.01)
    latency = [device.latency_ms for device in fleet]
    published_latency = [46, 61, 157, 315, 595]
    drawn = np.quantile(latency, [0.10, 0.25, 0.50, 0.75, 0.90])
    np.testing.assert_allclose(drawn, published_latency, rtol=0.06)
    assert (min(latency), max(latency)) == (pytest.approx(39), pytest.approx(757))


def test_resources_are_drawn_independently():
    fleet = draw_fleet(5000, seed=0)
    columns = [
        [device.memory_share, device.computation_share, device.communication_share]
        for device in fleet
    ]
    correlation = np.corrcoef(np.array(columns).T) - np.eye(3)
    assert np.abs(correlation).max() < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_the_binding_share_is_about_what_the_paper_allows(seed: int):
    binding = [
        min(device.memory_share, device.computation_share, device.communication_share)
        for device in draw_fleet(1000, seed=seed)
    ]
    assert 0.2 <= np.median(binding) <= 0.35
    assert min(binding) >= 0.1


def test_the_seed_decides_and_a_larger_fleet_starts_alike():
    assert draw_fleet(50, seed=3) == draw_fleet(200, seed=3)[:50]
    assert draw_fleet(50, seed=3) != draw_fleet(50, seed=4)


@pytest.mark.parametrize(("number", "seed"), [(0, 0), (-2, 0), (5, -1)])
def test_bad_numbers_are_refused(number: int, seed: int):
    with pytest.raises(ValueError, match="at least"):
        draw_fleet(number, seed=seed)
