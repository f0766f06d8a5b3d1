"""How many modules each device takes of each layer: many multi-dimensional knapsacks at once.

Modules of a layer cost the same, so of a layer a device takes its most important: only the counts
are to be found. Three steps, for all devices together:

1. *Prices* (Lagrangian multipliers) of the resources, such that every layer taking what is worth
   its price just about spends the budget. They also bound from above what any choice is worth.
2. *Enumeration.* Counts of all layers but the last, those first that lose least against the prices;
   the last layer takes what is left. The first `width` are kept, so small models are searched
   completely, and what was not looked at is known to lose at least `cut`.
3. *Exchange.* Where the bound does not prove the result, another count of one layer, and another
   layer takes what that leaves, as long as it pays.

Everything is element by element or sorts distinct integers: equal inputs give equal counts on every
machine, and in every batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

WIDTHS = (32, 256)
COMPLETE = 4096  # a search that is complete with so many counts is made where nothing else proves
TOLERANCE = 0.01  # a result proven to be this near the optimum is not searched further
PRICE_STEPS = 40
EXCHANGES = 20
_INDEX_BITS = 13  # of a sort key: the least significant bits of its float hold a column


def spending(shared: Array, price: Array, counts: Counts) -> Array:
    """Add up what counts cost in the order of `CostTable.of`: equal to it in every bit.

    Parameters
    ----------
    shared : np.ndarray
        ``[J]``, a number for each resource.
    price : np.ndarray
        ``[L, J]``, of one module.
    counts : np.ndarray
        ``[L, ...]``.

    Returns
    -------
    np.ndarray
        ``[J, ...]``.
    """
    each = (len(shared), *[1] * (counts.ndim - 1))
    total = shared.reshape(each)
    for layer, number in enumerate(counts):
        total = total + price[layer].reshape(each) * number
    return total


def best_counts(value: Array, shared: Array, price: Array, limit: Array) -> tuple[Counts, Array]:
    """Choose the counts of most value within the limits.

    Parameters
    ----------
    value : np.ndarray
        ``[N, L, D]``: of the modules of each layer, the most important first; -inf where a layer
        has fewer than N.
    shared, price : np.ndarray
        ``[J]`` and ``[L, J]``.
    limit : np.ndarray
        ``[J, D]``, may be infinite; one module of every layer must be within it.

    Returns
    -------
    counts : np.ndarray
        ``[L, D]``, at least 1.
    proven : np.ndarray
        ``[D]``: the share of the optimum that the counts reach at least, as far as is proven.
    """
    devices = value.shape[2]
    counts = np.ones(value.shape[1:], dtype=np.int64)
    reached = np.full(devices, -np.inf)
    bound = np.full(devices, np.inf)
    todo = np.arange(devices)
    complete = len(value) ** (value.shape[1] - 1)  # counts that there are, but of the last layer
    for width in (*WIDTHS, complete) if complete <= COMPLETE else WIDTHS:
        together = max(1, devices * WIDTHS[-1] // width)
        for some in np.split(todo, range(together, len(todo), together)):
            problem = _Problem(value[:, :, some], shared, price, limit[:, some])
            found, upper = problem.search(width)
            worth = problem.worth(found)
            better = worth > reached[some]
            counts[:, some[better]] = found[:, better]
            reached[some] = np.maximum(worth, reached[some])
            bound[some] = np.minimum(upper, bound[some])
        todo = np.flatnonzero(reached < (1 - TOLERANCE) * bound)
    top = np.maximum(bound, reached)
    return counts, np.divide(reached, top, out=np.ones_like(top), where=top > 0)


class _Problem:
    """The knapsacks of some devices; shapes as in `best_counts`."""

    def __init__(self, value: Array, shared: Array, price: Array, limit: Array) -> None:
        self.given, self.shared, self.price, self.limit = value, shared, price, limit
        self.modules, self.layers, self.devices = value.shape
        # What remains after one module a layer; never quite nothing, so that it can divide.
        ones = np.ones((self.layers, self.devices), dtype=np.int64)
        free = limit - self.spending(ones)
        least = 1e-9 * np.where(price.max(axis=0) > 0, price.max(axis=0), 1)
        free = np.maximum(free + 1e-12 * np.abs(self.spending(ones)), least[:, None])
        self.unit = price[:, :, None] / free  # [L, J, D]: a module as a share of what remains
        with np.errstate(divide="ignore"):
            most = 1 + np.floor(1 / self.unit.max(axis=1) + 1e-9)
        # Modules that no choice can pay for would only loosen the bound.
        affordable = np.arange(self.modules)[:, None, None] < most
        self.value = np.where(affordable, value, -np.inf)
        self.most = (self.value > -np.inf).sum(axis=0)  # [L, D]
        self.gain = np.cumsum(self.value, axis=0)  # [N, L, D]: of the first n modules

    def spending(self, counts: Counts) -> Array:
        """``[L, ...]`` to ``[J, ...]``."""
        return spending(self.shared, self.price, counts)

    def within(self, counts: Counts) -> NDArray[np.bool_]:
        """Whether counts, ``[L, D, ...]``, keep to the limits: ``[D, ...]``."""
        limit = self.limit.reshape(*self.limit.shape, *[1] * (counts.ndim - 2))
        return np.logical_and.reduce(self.spending(counts) <= limit, axis=0)  # type: ignore[no-any-return]

    def worth(self, counts: Counts) -> Array:
        """Value of counts ``[L, D]``, added up layer by layer: ``[D]``."""
        total = np.zeros(self.devices)
        for layer, number in enumerate(counts):
            total = total + self.gain[number - 1, layer, np.arange(self.devices)]
        return total

    def prices(self) -> tuple[Array, Array]:
        """Find prices of all that remains of each resource, ``[J, D]``, and the bound, ``[D]``."""
        first = self.value[0].copy()
        total = np.zeros(self.devices)
        extra = np.zeros(self.devices)
        for layer in range(self.layers):
            total = total + first[layer]
            extra = extra + self.gain[self.most[layer] - 1, layer, np.arange(self.devices)]
        others = self.value[1:]
        columns = np.arange(self.devices)
        resources = len(self.shared)
        price = np.zeros((resources, self.devices)) + (extra - total) / resources
        best_price, best_bound = price, np.full(self.devices, np.inf)
        step = 0.72
        for _ in range(PRICE_STEPS):
            each = _weighted(self.unit, price)
            taken = (others > each).sum(axis=0, dtype=np.int64)
            bound = np.zeros(self.devices)
            for resource in range(resources):
                bound = bound + price[resource]
            used = np.zeros_like(price)
            for layer in range(self.layers):
                bound = bound + self.gain[taken[layer], layer, columns] - taken[layer] * each[layer]
                used = used + self.unit[layer] * taken[layer]
            better = bound < best_bound
            best_price = np.where(better, price, best_price)
            best_bound = np.where(better, bound, best_bound)
            # What is overspent becomes dearer, what is left over cheaper.
            price = price * (1 + step * np.clip(used - 1, -1, 1))
            step *= 0.93
        return best_price, best_bound

    def search(self, width: int) -> tuple[Counts, Array]:
        """Search that far, and from what is found: counts ``[L, D]`` and their bound ``[D]``."""
        found, upper = self.enumerate(width)
        doubtful = self.worth(found) < (1 - TOLERANCE) * upper
        if doubtful.any():
            part = _Problem(
                self.given[:, :, doubtful], self.shared, self.price, self.limit[:, doubtful]
            )
            found[:, doubtful] = part.exchange(found[:, doubtful])
        return self.fill(found), upper

    def enumerate(self, width: int) -> tuple[Counts, Array]:
        """Search the counts that lose least against the prices.

        Returns
        -------
        counts : np.ndarray
            ``[L, D]``: the best found.
        bound : np.ndarray
            ``[D]``: no counts are worth more.
        """
        price, bound = self.prices()
        each = _weighted(self.unit, price)
        rows = np.arange(self.devices)
        loss = np.zeros((self.devices, 1))
        left = np.ones((len(self.shared), self.devices, 1))  # shares of what remains
        counts = np.ones((self.layers, self.devices, 1), dtype=np.int64)
        cut = np.full(self.devices, np.inf)
        for layer in range(self.layers - 1):
            profit = self.gain[:, layer] - np.arange(self.modules)[:, None] * each[layer]
            option, option_loss = _ascending((profit.max(axis=0) - profit).T)
            # A pair outside has at least `width` pairs inside that lose no more.
            state, rank = _pairs(width, self.modules, loss.shape[1], inside=True)
            more = option[:, rank]
            rest = left[:, :, state] - self.unit[layer][:, :, None] * more
            lost = loss[:, state] + option_loss[:, rank]
            lost[(rest < -1e-9).any(axis=0)] = np.inf
            outer, outer_rank = _pairs(width, self.modules, loss.shape[1], inside=False)
            if len(outer):
                cut = np.minimum(cut, (loss[:, outer] + option_loss[:, outer_rank]).min(axis=1))
            order, ranked = _ascending(lost)
            if ranked.shape[1] > width:
                cut = np.minimum(cut, ranked[:, width])
            order, loss = order[:, :width], ranked[:, :width]
            left = np.take_along_axis(rest, order[None], axis=2)
            counts = np.take_along_axis(counts[:, :, state], order[None], axis=2)
            counts[layer] = 1 + np.take_along_axis(more, order, axis=1)
        counts[-1] = self._last(counts)
        possible = np.isfinite(loss) & (counts[-1] >= 1) & self.within(counts)
        worth = np.zeros(loss.shape)
        for layer, number in enumerate(counts):
            worth = worth + self.gain[np.maximum(number, 1) - 1, layer, rows[:, None]]
        worth[~possible] = -np.inf
        best = worth.argmax(axis=1)
        found = np.where(possible[rows, best], counts[:, rows, best], 1)
        return found, bound - cut

    def _last(self, counts: Counts) -> Counts:
        """Count the modules of the last layer that the others leave room for: ``[D, K]``."""
        counts = counts.copy()
        counts[-1] = 0
        room = self.limit[:, :, None] - self.spending(counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            number = np.floor(room / self.price[-1][:, None, None])
        number = np.where(np.isnan(number), np.inf, number).min(axis=0) + 1
        counts[-1] = np.clip(number, 0, self.most[-1][:, None]).astype(np.int64)
        for _ in range(2):  # the division may be off by one
            counts[-1] = np.maximum(counts[-1] - ~self.within(counts), 0)
        last: Counts = counts[-1]
        return last

    def exchange(self, counts: Counts) -> Counts:
        """Let two layers share anew what they spend, as long as that is worth more."""
        rows = np.arange(self.devices)
        number = np.arange(1, self.modules + 1)[:, None]
        for _ in range(EXCHANGES):
            room = np.ones((len(self.shared), self.devices))
            for layer in range(self.layers):
                room = room - self.unit[layer] * (counts[layer] - 1)
            best = np.full(self.devices, 1e-12)
            changed = counts.copy()
            for one in range(self.layers):
                freed = room[:, None] + self.unit[one][:, None] * (counts[one] - number)
                own = self.gain[:, one] - self.gain[counts[one] - 1, one, rows]
                for other in range(self.layers):
                    if other == one:
                        continue
                    with np.errstate(divide="ignore", invalid="ignore"):
                        fit = np.floor((freed + 1e-12) / self.unit[other][:, None])
                    fit = counts[other] + np.where(np.isnan(fit), -np.inf, fit).min(axis=0)
                    then = np.clip(fit, 1, self.most[other]).astype(np.int64)
                    more = own + (
                        self.gain[then - 1, other, rows] - self.gain[counts[other] - 1, other, rows]
                    )
                    more[fit < 1] = -np.inf
                    at = more.argmax(axis=0)
                    better = more[at, rows] > best
                    best = np.where(better, more[at, rows], best)
                    trial = counts.copy()
                    trial[one], trial[other] = at + 1, then[at, rows]
                    changed = np.where(better, trial, changed)
            changed = np.where(self.within(changed), changed, counts)
            if (changed == counts).all():
                break
            counts = changed
        return counts

    def fill(self, counts: Counts) -> Counts:
        """Add what still fits, in layers whose next module matters most first."""
        rows = np.arange(self.devices)
        counts = counts.copy()
        layers = np.arange(self.layers)[:, None]
        following = self.value[np.minimum(counts, self.modules - 1), layers, rows]
        for layer in np.argsort(-following, axis=0, kind="stable"):
            held = counts[layer, rows]
            with np.errstate(divide="ignore", invalid="ignore"):
                more = np.floor((self.limit - self.spending(counts)) / self.price[layer].T)
            most = self.most[layer, rows]
            fit = held + np.where(np.isnan(more), np.inf, more).min(axis=0) + 1
            counts[layer, rows] = np.clip(fit, held, most).astype(np.int64)
            for _ in range(2):  # the division may be off by one
                too_many = ~self.within(counts) & (counts[layer, rows] > held)
                counts[layer, rows] -= too_many
        return counts


def _weighted(unit: Array, price: Array) -> Array:
    """Return what a module of each layer costs at these prices: ``[L, D]``."""
    total: Array = unit[:, 0] * price[0]
    for resource in range(1, len(price)):
        total = total + unit[:, resource] * price[resource]
    return total


def _ascending(loss: Array) -> tuple[Counts, Array]:
    """Sort each row: columns, and values (at most) in that order.

    Losses are not negative, so their bits sort as they do. The last bits give way to the column:
    all keys differ, which any sort puts in the same order.
    """
    mask = (1 << _INDEX_BITS) - 1
    keys = np.maximum(np.ascontiguousarray(loss), 0).view(np.int64)
    keys = keys & ~mask | np.arange(loss.shape[1])
    keys.sort(axis=1)
    ranked = (keys & ~mask).view(np.float64)
    return keys & mask, ranked


@lru_cache(maxsize=256)
def _pairs(width: int, modules: int, states: int, *, inside: bool) -> tuple[Counts, Counts]:
    """Which (state, option), both by rank, can be among the `width` best; or the first that can't.

    Pair (i, j) loses no less than the (i + 1)(j + 1) pairs (up to i, up to j).
    """
    state, rank = (axis.ravel() for axis in np.indices((states, modules)))
    kept = (state + 1) * (rank + 1) <= width
    if not inside:
        kept = (state == width // (rank + 1)) & ~kept
    return state[kept], rank[kept]
