"""Which learning rates are tried, and on which seeds: the same for every strategy."""

from __future__ import annotations

from simulations.settings import SettingsError, split_list

TRIALS = (0.0005, 0.002, 0.008)
SEEDS = "1000"  # no table uses it


def split_trials(text: str) -> tuple[float, ...]:
    """Split a comma separated list of trial rates.

    Raises
    ------
    SettingsError
        They are no learning rates.
    """
    try:
        trials = tuple(float(part) for part in split_list(text))
    except ValueError:
        trials = ()
    if len(set(trials)) < max(1, len(trials)) or not all(0 < rate < 10 for rate in trials):
        raise SettingsError(f"Expected --trials as learning rates, like 0.001,0.01, got '{text}'.")
    return tuple(sorted(trials))
