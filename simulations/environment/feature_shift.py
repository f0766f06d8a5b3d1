"""Which device sees its data how, and when that changes.

Devices come in as many groups as there are views; a group shares its surroundings, and so its view.
At a step that shifts, each group moves on with the probability of the shift, to any other view.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simulations.environment.rows import Rows, expect, generator
from simulations.environment.views import IMAGE_VIEWS, SIGNAL_VIEWS, View, one_after_another


@dataclass(frozen=True, kw_only=True)
class FeatureShift:
    """A choice of views.

    Attributes
    ----------
    known : bool
        The cloud's proxy data has been seen in the same views; else only as it is.
    names : tuple[str, ...] (default: ())
        Of the views; empty: all that suit the data, without "plain" where they are new. A name of
        several, "negative+rotation", is one view after another.
    strength : int (default: 3)
        1 to 5.
    """

    known: bool
    names: tuple[str, ...] = ()
    strength: int = 3

    def views(self, *, images: bool) -> list[View]:
        """Return the views.

        Raises
        ------
        DataError
            There is no such view for this kind of data, or fewer than two are left.
        """
        suited = IMAGE_VIEWS if images else SIGNAL_VIEWS
        names = self.names or tuple(name for name in suited if self.known or name != "plain")
        parts = {name: name.split("+") for name in names}
        unknown = [name for name in names if not suited.keys() >= set(parts[name])]
        kind = "images" if images else "signals"
        expect(not unknown, f"views of {kind} from {', '.join(suited)}", ", ".join(unknown))
        expect(len(set(names)) == len(names) >= 2, "at least two different views", ",".join(names))
        expect(1 <= self.strength <= 5, "a strength of 1 to 5", self.strength)
        return [one_after_another([suited[part] for part in parts[name]]) for name in names]


class Surroundings:
    """The views of all devices over time.

    Parameters
    ----------
    shift : FeatureShift
        Which views.
    images : bool
        The data are images.
    devices, seed : int
        Together they decide who is in which group.
    share : float
        Probability that a group moves on when data shifts.
    """

    def __init__(
        self, shift: FeatureShift, *, images: bool, devices: int, seed: int, share: float
    ) -> None:
        self._views = shift.views(images=images)
        self._strength, self._seed, self._share = shift.strength, seed, share
        self._group = generator(seed, "groups").permutation(devices) % len(self._views)
        self._of_group: list[Rows] = [np.arange(len(self._views))]  # view of each group, by phase

    def view_of(self, device: int, phase: int) -> int:
        """Return the number of the view a device has in a phase."""
        while len(self._of_group) <= phase:
            rng = generator(self._seed, f"views in phase {len(self._of_group)}")
            now, number = self._of_group[-1], len(self._views)
            moving = rng.random(number) < self._share
            step = rng.integers(1, number, number)  # to any other
            self._of_group.append(np.where(moving, (now + step) % number, now))
        return int(self._of_group[phase][self._group[device]])

    def spread(self, number: int, purpose: str) -> Rows:
        """Give each of a number of samples a view, all equally often, at random."""
        views = np.arange(number) % len(self._views)
        return generator(self._seed, purpose).permutation(views)

    def seen(self, x: Tensor, views: int | Rows, purpose: str) -> Tensor:
        """Return samples as they look: all in one view, or each in its own."""
        numbers = np.broadcast_to(views, len(x))
        result = x.clone()
        for number in np.unique(numbers).tolist():
            seed = int(generator(self._seed, f"{purpose} in view {number}").integers(2**31))
            own = torch.from_numpy(numbers == number)
            view = self._views[number]
            result[own] = view(x[own], self._strength, torch.Generator().manual_seed(seed))
        return result
