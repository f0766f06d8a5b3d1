"""Updates that are well formed but far from those of their peers in the same round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eclm_flower.adaptation.update import Update
from eclm_flower.errors import ReplyError
from eclm_flower.modular.split import ModuleLayer, layer_by_key

LEAST_PEERS = 4
"""Updates a round needs for their median to say anything of one of them."""
FIRST = 16
"""Updates to know before any is merged; until then they wait, or for the round to end."""
_IN_CACHE = 2**18  # values
_SMALL = 2**15  # values for which calling PyTorch takes longer than computing


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far an update may be from its peers; what is farther is refused.

    Both are multiples of the median over the round's updates, and hold in rounds of at least
    `LEAST_PEERS` of them. None switches a limit off.

    Attributes
    ----------
    norm : float, optional (default: 10)
        Of the norm of an update: the root mean square, over all values a device holds, of their
        change. A module more or less makes no difference to it.
    examples : float, optional (default: 100)
        Of the number of examples, which weighs an update and is the device's own claim.
    """

    norm: float | None = 10.0
    examples: float | None = 100.0

    def __post_init__(self) -> None:
        for name, limit in (("norm", self.norm), ("examples", self.examples)):
            if limit is not None and not limit > 1:
                raise ValueError(f"Expected the limit '{name}' to be above 1 or None, got {limit}.")


class Peers:
    """What is usual among the updates of a round, known before all of them are there.

    An update is told apart as it comes, by those of earlier rounds and of this one so far. Who is
    beyond the limits then waits until the round is complete: what counts in the end is the median
    over the round.

    Parameters
    ----------
    limits : Limits
        How far is too far.
    earlier : sequence of (float, float)
        Norm and examples of updates merged in earlier rounds.
    """

    def __init__(self, limits: Limits, earlier: Sequence[tuple[float, float]]) -> None:
        self.limits = limits
        self._earlier = list(earlier)
        self._round: list[tuple[float, float]] = []

    def join(self, update: Update, norm: float) -> int:
        """Take an update of the round into account.

        Parameters
        ----------
        update : Update
            What came.
        norm : float
            Its `update_norm`.

        Returns
        -------
        int
            How many updates are known; `usual` says something of one from `FIRST` on.
        """
        self._round.append((norm, update.num_examples))
        return len(self._earlier) + len(self._round)

    def usual(self, update: Update, norm: float) -> bool:
        """Whether an update is within the limits, as far as is known."""
        return self._judged(update, norm, [*self._earlier, *self._round]) is None

    def refused(self, update: Update, norm: float) -> ReplyError | None:
        """Say, once the round is complete, why an update that is not usual is refused, if it is."""
        if len(self._round) < LEAST_PEERS:
            return None
        return self._judged(update, norm, self._round)

    def _judged(
        self, update: Update, norm: float, peers: list[tuple[float, float]]
    ) -> ReplyError | None:
        usual_norm, usual_examples = np.median(np.array(peers), axis=0)
        most = self.limits.examples
        if most is not None and update.num_examples > most * usual_examples:
            return ReplyError(
                f"Expected at most {most:g} times the median number of examples of the round, "
                f"{usual_examples:g}, got {update.num_examples:g}. If that is true, raise "
                "Limits.examples.",
                "examples",
            )
        most = self.limits.norm
        # Where most devices return what they were sent, a change is not suspicious.
        if most is not None and usual_norm > 0 and norm > most * usual_norm:
            return ReplyError(
                f"Expected a change of norm up to {most:g} times the round's median of "
                f"{usual_norm:.3g}, got {norm:.3g}. If it is honest, raise Limits.norm.",
                "norm",
            )
        return None


class ChangeNorm:
    """Measures how much updates change: once a round it looks at the state they started from.

    Parameters
    ----------
    state : dict[str, Tensor]
        The cloud model's body as devices got it.
    layers : iterable of ModuleLayer
        Its module layers.
    """

    def __init__(self, state: Mapping[str, Tensor], layers: Iterable[ModuleLayer]) -> None:
        self._layer_of = layer_by_key(layers)
        self._before = {
            key: layer.packed(key, tensor) if (layer := self._layer_of.get(key)) else tensor[None]
            for key, tensor in state.items()
        }
        self._scratch = {
            dtype: torch.empty(_IN_CACHE, dtype=dtype)
            for dtype in {tensor.dtype for tensor in state.values()}
        }

    def of(self, update: Update) -> float:
        """Root mean square, over all values a device holds, of their change.

        It is not finite if a value is not, or if a change is too large for its square to be a
        number.
        """
        held = {name: (list(of), torch.tensor(of)) for name, of in update.selection.items()}
        whole = [0], torch.tensor([0])
        squares, values = 0.0, 0
        for key, tensor in update.state.items():
            layer = self._layer_of.get(key)
            after = layer.packed(key, tensor) if layer else tensor[None]
            modules, index = held[layer.name] if layer else whole
            before, scratch = self._before[key], self._scratch[tensor.dtype]
            if after.numel() <= _SMALL:
                change = before.index_select(0, index).sub_(after).view(-1)
                squares += float(torch.dot(change, change))
            else:
                squares += _squared_distance(before, after, modules, scratch)
            values += tensor.numel()
        return float(np.sqrt(squares / values))


def update_norm(
    update: Update, state: Mapping[str, Tensor], layers: Iterable[ModuleLayer]
) -> float:
    """Measure a single update; see `ChangeNorm`."""
    return ChangeNorm(state, layers).of(update)


def _squared_distance(old: Tensor, new: Tensor, held: list[int], scratch: Tensor) -> float:
    """Sum the squares of ``new[i] - old[held[i]]``, ``[m, ...]`` and ``[N, ...]``.

    Differences are computed in pieces that fit into `scratch`, and so into a cache.
    """
    # In the order of memory, whatever that of the dimensions: it is many times faster.
    order = sorted(range(1, new.ndim), key=new.stride, reverse=True)
    before = old.permute(0, *order).unbind()
    after = new.permute(0, *order).unbind()
    shape = list(after[0].shape)
    longest = max(range(len(shape)), key=shape.__getitem__, default=0)
    length, size = (shape[longest], after[0].numel()) if shape else (1, 1)
    together = max(1, len(scratch) * length // size)
    total = 0.0
    for start in range(0, length, together):
        if shape:
            shape[longest] = min(together, length - start)
        number = math.prod(shape)
        if len(scratch) < number:
            scratch = scratch.new_empty(number)
        change = scratch[:number]
        shaped = change.view(shape)
        for module, whole in zip(held, after, strict=True):
            piece, other = whole, before[module]
            if number < size:
                piece = piece.narrow(longest, start, shape[longest])
                other = other.narrow(longest, start, shape[longest])
            torch.sub(piece, other, out=shaped)
            total += float(torch.dot(change, change))
    return total
