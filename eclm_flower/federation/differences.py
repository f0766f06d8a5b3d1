"""Returning what changed instead of what it became, at low precision (8-bit, half).

A value rounded to 8 bits loses most of what a few steps of training changed; a change rounded to 8
bits does not. What it loses is not lost for good: with `ErrorFeedback` a device adds it to its next
reply (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Array
from torch import Tensor, nn

from eclm_flower.errors import RequestError
from eclm_flower.federation.cache import ModuleCache, module_piece
from eclm_flower.federation.messages import SHARED
from eclm_flower.federation.wire import (
    MODULES_PART,
    SHARED_PART,
    by_part,
    flattened,
    forms,
    unflattened,
)
from eclm_flower.modular.model import body_of
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.split import ModuleLayer, columns_of

_RECEIVED = "_eclm_received"


class ErrorFeedback:
    """What earlier replies of a device lost in rounding, by module; on disk, like a `ModuleCache`.

    Parameters
    ----------
    folder : path
        Of this device alone; made when something is stored. Never larger than the cloud model.
    """

    def __init__(self, folder: str | Path) -> None:
        self._pieces = ModuleCache(folder)

    def add_to(self, change: Mapping[str, Mapping[str, Tensor]], received: Received) -> None:
        """Add what was lost to a change, in place."""
        for name, module, piece in received.pieces(change):
            for key, lost in self._pieces.load(name, module).items():
                if key in piece and piece[key].shape == lost.shape:
                    piece[key].add_(lost)

    def keep(self, lost: Mapping[str, Mapping[str, Tensor]], received: Received) -> None:
        """Keep what a reply loses, for the next one; training that diverged leaves nothing."""
        for name, module, piece in received.pieces(lost):
            if all(bool(tensor.isfinite().all()) for tensor in piece.values()):
                self._pieces.put(name, module, piece)


@dataclass(frozen=True, kw_only=True)
class Received:
    """What a device was sent, for as long as its reply is to say what changed.

    Attributes
    ----------
    tensors : dict[str, dict[str, Tensor]]
        Part -> key -> tensor.
    layers : list of ModuleLayer
        The model's module layers.
    selection : dict[str, sequence of int]
        The modules received.
    dtype : torch.dtype
        What the change is to be sent as.
    feedback : ErrorFeedback, optional
        What earlier replies lost.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    layers: list[ModuleLayer]
    selection: Selection
    dtype: torch.dtype
    feedback: ErrorFeedback | None

    def pieces(
        self, parts: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """Iterate over modules and shared part: name of the layer, number, views of them."""
        yield SHARED, 0, dict(parts[SHARED_PART])
        for layer in self.layers:
            for position, module in enumerate(self.selection[layer.name]):
                yield layer.name, module, module_piece(layer, parts[MODULES_PART], position)

    def change(self, body: nn.Module) -> dict[str, Array]:
        """Say what changed, as arrays."""
        state = body.state_dict()
        change = {
            part: {key: state[key].detach().cpu().float() - before for key, before in own.items()}
            for part, own in self.tensors.items()
        }
        if self.feedback is not None:
            self.feedback.add_to(change, self)
        arrays: dict[str, Array] = {}
        for part, own in change.items():
            arrays.update(flattened(part, own, self.dtype, columns=columns_of(self.layers)))
        if self.feedback is not None:
            tensors = {key: tensor for own in change.values() for key, tensor in own.items()}
            expected = by_part(forms(tensors), self.layers)
            arrived = unflattened(arrays, expected, self.dtype)
            lost = {
                part: {key: tensor - arrived[part][key] for key, tensor in own.items()}
                for part, own in change.items()
            }
            self.feedback.keep(lost, self)
        return arrays


def remember(sub_model: nn.Module, received: Received) -> None:
    """Attach what was received to a sub-model; it is no part of its state."""
    object.__setattr__(sub_model, _RECEIVED, received)


def change_of(sub_model: nn.Module) -> dict[str, Array]:
    """Return the arrays of a reply that says what changed.

    Raises
    ------
    RequestError
        It is not the model that `receive` returned.
    """
    received = getattr(sub_model, _RECEIVED, None)
    if received is None:
        raise RequestError(
            "The cloud asks for what changed, so that the reply must be given the very model that "
            f"receive returned, trained; got another {type(sub_model).__name__}."
        )
    body = body_of(sub_model)
    return received.change(body)  # type: ignore[no-any-return]
