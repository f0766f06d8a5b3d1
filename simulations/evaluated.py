"""Which devices are evaluated, where evaluating all would take too long: a seeded sample.

The same devices at every evaluation and for every method of a seed, so that what is compared are
methods and moments, not draws; and a device that keeps its model is met again.
"""

from __future__ import annotations

from eclm_flower.federation import Roster
from eclm_flower.federation.roster import EVALUATE


class SteadyRoster(Roster):
    """A roster that draws the same devices for every evaluation."""

    def draw(self, number: int, *, server_round: int, purpose: int) -> list[int]:
        """Draw devices without replacement; for evaluations, as if in round 0."""
        steady = 0 if purpose == EVALUATE else server_round
        return super().draw(number, server_round=steady, purpose=purpose)
