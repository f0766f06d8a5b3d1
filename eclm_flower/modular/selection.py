"""A selection: which modules of each layer a sub-model is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from eclm_flower.errors import SelectionError
from eclm_flower.modular.split import ModuleLayer

Selection = Mapping[str, Sequence[int]]
"""Layer name -> module numbers, ascending."""


def whole(layers: Iterable[ModuleLayer]) -> dict[str, tuple[int, ...]]:
    """Select every module of every layer: the whole cloud model."""
    return {layer.name: tuple(range(layer.modules)) for layer in layers}


def checked(selection: Selection, layers: Iterable[ModuleLayer]) -> dict[str, tuple[int, ...]]:
    """Return the selection in canonical form (ascending tuples), or say what is wrong with it.

    Raises
    ------
    SelectionError
        A layer is missing, unknown or empty, or a module number is out of range or repeated.
    """
    layers = list(layers)
    unknown = set(selection) - {layer.name for layer in layers}
    if unknown:
        raise SelectionError(
            f"Expected layers {[layer.name for layer in layers]}, got unknown {sorted(unknown)}."
        )
    result = {}
    for layer in layers:
        modules = tuple(sorted(int(number) for number in selection.get(layer.name, ())))
        if not modules:
            raise SelectionError(
                f"Expected at least one module in layer '{layer.name}', got none: a sub-model "
                "needs a module in every layer."
            )
        if len(set(modules)) < len(modules):
            raise SelectionError(f"Layer '{layer.name}' names a module twice: {modules}.")
        if modules[0] < 0 or modules[-1] >= layer.modules:
            raise SelectionError(
                f"Expected modules 0 to {layer.modules - 1} in layer '{layer.name}', got {modules}."
            )
        result[layer.name] = modules
    return result


def count(selection: Selection) -> int:
    """Count the modules of a selection over all layers."""
    return sum(len(modules) for modules in selection.values())
