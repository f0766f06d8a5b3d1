"""Which blocks of a model become module layers, and how many modules each gets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import nn

from eclm_flower.errors import CoupledUnitsError
from eclm_flower.modular.families import splits_of
from eclm_flower.modular.split import ModuleLayer, Split


def find_module_layers(
    model: nn.Module, most_modules: int, *, keep_whole: bool
) -> Iterator[ModuleLayer]:
    """Find the blocks of a model that can be cut.

    What an outer block cuts, the blocks inside it don't.

    Parameters
    ----------
    model : nn.Module
        The whole cloud model.
    most_modules : int
        Most modules of a layer: a block gets the largest number up to this that divides its units,
        and is left out if that is 1 (unless `most_modules` is).
    keep_whole : bool
        Leave out blocks that have no exact split.

    Raises
    ------
    CoupledUnitsError
        A block has no exact split and `keep_whole` is False, or two tensors are one.
    """
    names: set[str] = set()
    cut: set[str] = set()
    tied = _tied(model)
    for path, prefix, splits in _splits(model, keep_whole=keep_whole):
        for number, split in enumerate(splits):
            keys = {f"{prefix}{key}": axis for key, axis in split.axes.items()}
            if not cut.isdisjoint(keys):
                continue
            cut.update(keys)
            modules = max(n for n in range(1, most_modules + 1) if split.units % n == 0)
            if modules == 1 < most_modules:
                continue
            both = next((key for key in keys if key in tied), None)
            if both is not None and keep_whole:
                continue
            if both is not None:
                raise CoupledUnitsError(
                    f"'{both}' and '{tied[both]}' are one tensor: cutting one would cut the other. "
                    "Give each a tensor of its own, or keep the block whole with keep_whole=True."
                )
            name = path if path and len(splits) == 1 else f"{prefix}{number}"
            if name in names:  # a block's own path, and a number in the block around it
                name = f"{prefix}{split.mixer}"
            names.add(name)
            yield ModuleLayer(
                name=name,
                modules=modules,
                units=split.units,
                axes=keys,
                mixer=f"{prefix}{split.mixer}",
                channel_axis=split.channel_axis,
            )


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of tensors that have another name, too, and that name."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        by_tensor.setdefault(id(tensor), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in by_tensor.values()
        if len(names) > 1
        for name in names
    }


def _splits(model: nn.Module, *, keep_whole: bool) -> Iterator[tuple[str, str, list[Split]]]:
    """Path, prefix of keys and splits of each block of a known family."""
    for path, block in model.named_modules():
        try:
            splits = splits_of(block)
        except CoupledUnitsError as error:
            if keep_whole:
                continue
            where = f"'{path}' ({type(block).__name__})" if path else type(block).__name__
            raise CoupledUnitsError(
                f"{where} can't be cut exactly: {error} Pass keep_whole=True to cut the other "
                "blocks and keep such ones whole, as part of what every device holds."
            ) from error
        if splits:
            yield path, f"{path}." if path else "", splits
