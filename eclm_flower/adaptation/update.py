"""What one device returns, and the checks that it can be merged at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eclm_flower.adaptation.profile import Importance
from eclm_flower.errors import ReplyError
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.split import ModuleLayer, layer_by_key

_MOST_EXAMPLES = 2**53  # larger counts aren't exact, and their sums overflow


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one device returns after adapting its sub-model.

    Attributes
    ----------
    device : int
        The device's number; a merge is done in its order, whatever the order of arrival.
    selection : dict[str, sequence of int]
        Modules held, ascending.
    state : dict[str, Tensor]
        Body key -> tensor; modular ones ``[..., m * h, ...]``.
    importance : dict[str, np.ndarray]
        Layer name -> ``[N]``.
    num_examples : float
        Training examples behind the update; > 0.
    """

    device: int
    selection: Selection
    state: Mapping[str, Tensor]
    importance: Importance
    num_examples: float


def sent(
    selection: Selection, state: Mapping[str, Tensor], layers: Iterable[ModuleLayer]
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over what a device was sent: body keys and tensors, modular ones cut to its modules.

    Parameters
    ----------
    selection : dict[str, sequence of int]
        The device's modules.
    state : dict[str, Tensor]
        The cloud model's body; integer buffers never travel.
    layers : iterable of ModuleLayer
        The cloud model's module layers.
    """
    layer_of = layer_by_key(layers)
    for key, tensor in state.items():
        if tensor.is_floating_point():
            layer = layer_of.get(key)
            yield key, layer.take(key, tensor, selection[layer.name]) if layer else tensor


def expected_shapes(
    selection: Selection, state: Mapping[str, Tensor], layers: Iterable[ModuleLayer]
) -> dict[str, list[int]]:
    """Say which arrays a device has to return, and their shapes."""
    shapes = {
        key: list(tensor.shape) for key, tensor in state.items() if tensor.is_floating_point()
    }
    for layer in layers:
        for key in layer.axes:
            if key in shapes:
                modules = len(selection[layer.name])
                shapes[key] = layer.narrowed_shape(key, shapes[key], modules)
    return shapes


def check_keys(got: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse arrays under other keys than were sent.

    Raises
    ------
    ReplyError
        Keys are missing or surplus.
    """
    got, expected = set(got), set(expected)
    if got != expected:
        raise ReplyError(
            f"Expected the arrays that were sent; missing {sorted(expected - got)[:3]}, "
            f"surplus {sorted(got - expected)[:3]}.",
            "keys",
        )


def check_update(
    update: Update, state: Mapping[str, Tensor], layers: Iterable[ModuleLayer]
) -> None:
    """Refuse an update that can't be merged, before it touches anything.

    Raises
    ------
    ReplyError
        Missing or surplus keys, wrong shape or dtype, NaN or infinity, or an impossible number of
        examples.
    """
    check_examples(update.num_examples)
    expected = expected_shapes(update.selection, state, layers)
    check_keys(update.state, expected)
    for key, shape in expected.items():
        tensor = update.state[key]
        if list(tensor.shape) != shape:
            raise ReplyError(
                f"Expected '{key}' of shape {shape}, got {list(tensor.shape)}.", "shape"
            )
        if tensor.dtype != state[key].dtype:
            raise ReplyError(
                f"Expected '{key}' of {state[key].dtype}, got {tensor.dtype}.", "dtype"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ReplyError(
                f"Expected finite values in '{key}', got NaN or infinity.", "not-finite"
            )


def check_examples(number: float) -> None:
    """Refuse an impossible number of examples.

    Raises
    ------
    ReplyError
        It is not above 0, or too large to be counted exactly.
    """
    if not 0 < number <= _MOST_EXAMPLES:  # false for nan, too
        raise ReplyError(
            f"Expected a number of examples above 0 and up to 2**53, got {number}.",
            "examples",
        )
