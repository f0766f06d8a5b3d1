"""A sub-model on the wire: its tensors end to end, one array a part.

Flower describes, hashes and stores every array apart, about 450 bytes each; a sub-model has dozens
of small ones. Both sides know the tensors and their order, so they travel as one array for the
shared part, the same for every device, and one for the modules chosen (and one for the selector,
where that is sent). An array is named ``<part>.<dtype>``; tensors of different dtypes travel apart.
Tensors whose modules lie along a later axis than the first travel in columns (`columns_of`), so
that the values of a module are together when the cloud merges them.

A part can also be sent at a lower precision than its tensors have: in half precision, or as 8-bit
integers with a scale for every `BLOCK` values (those of one block share an order of magnitude).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from flwr.app import Array
from torch import Tensor

from eclm_flower.errors import ReplyError
from eclm_flower.federation.decoding import read_array
from eclm_flower.federation.messages import to_array
from eclm_flower.modular.split import ModuleLayer, columns_of, layer_by_key, turned

SHARED_PART, MODULES_PART, SELECTOR_PART = "shared", "modules", "selector"

BLOCK = 1024
"""Values that share a scale when they travel as 8-bit integers."""


COLUMNS = "c"
LETTERS = {SHARED_PART: "s", MODULES_PART: f"m{COLUMNS}"}
"""Part -> letters of its tensors, where each is told by one; the last: it travels in columns."""


class Form(NamedTuple):
    """Shape and dtype of a tensor, and whether it travels in columns."""

    shape: Sequence[int]
    dtype: torch.dtype
    columns: bool = False


def forms(state: Mapping[str, Tensor]) -> dict[str, Form]:
    """Say what travels of a state: floating-point tensors, never counters."""
    return {key: Form(t.shape, t.dtype) for key, t in state.items() if t.is_floating_point()}


def by_part(body: Mapping[str, Form], layers: Iterable[ModuleLayer]) -> dict[str, dict[str, Form]]:
    """Divide a body's tensors into shared part and modules, in their order."""
    layers = list(layers)
    modular = layer_by_key(layers).keys()
    columns = columns_of(layers)
    return {
        SHARED_PART: {key: form for key, form in body.items() if key not in modular},
        MODULES_PART: {
            key: form._replace(columns=key in columns)
            for key, form in body.items()
            if key in modular
        },
    }


def flattened(
    part: str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    columns: Collection[str] = (),
) -> dict[str, Array]:
    """Lay a part's tensors end to end: name -> array, one for each dtype.

    Parameters
    ----------
    part : str
        Its name.
    tensors : dict[str, Tensor]
        Its tensors.
    dtype : torch.dtype, optional
        float16, bfloat16 or int8: send all of them so. None: as they are.
    columns : collection of str
        Keys of those that travel in columns.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        flat = (turned(tensor) if key in columns else tensor).reshape(-1)
        by_dtype.setdefault(dtype or tensor.dtype, []).append(flat.float() if dtype else flat)
    return {
        _name(part, sent): to_array(_stored(torch.cat(flat), sent))
        for sent, flat in by_dtype.items()
    }


def unflattened(
    arrays: Mapping[str, Array],
    parts: Mapping[str, Mapping[str, Form]],
    dtype: torch.dtype | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Cut the tensors of parts out of their arrays.

    Parameters
    ----------
    arrays : dict[str, Array]
        By name, as from `flattened`.
    parts : dict[str, dict[str, Form]]
        Part -> key -> form of the tensors expected, in their order.
    dtype : torch.dtype, optional
        What they were sent as; see `flattened`. The selector is always sent as it is.

    Returns
    -------
    dict[str, dict[str, Tensor]]
        Part -> key -> tensor. Where `dtype` is None they are views of the arrays' bytes: not to be
        written to.

    Raises
    ------
    ReplyError
        An array is missing, surplus, or of another size or dtype.
    """
    sizes: dict[tuple[str, torch.dtype], int] = {}
    for part, expected in parts.items():
        for shape, own, _ in expected.values():
            sent = _sent_as(part, own, dtype)
            sizes[part, sent] = sizes.get((part, sent), 0) + math.prod(shape)
    names = {_name(part, sent) for part, sent in sizes}
    if arrays.keys() != names:
        raise ReplyError(
            f"Expected the arrays {sorted(names)}; missing {sorted(names - arrays.keys())}, "
            f"surplus {sorted(arrays.keys() - names)[:3]}.",
            "keys",
        )
    flat = {
        (part, sent): _restored(arrays[_name(part, sent)], _name(part, sent), size, sent)
        for (part, sent), size in sizes.items()
    }
    position = dict.fromkeys(sizes, 0)
    tensors: dict[str, dict[str, Tensor]] = {}
    for part, expected in parts.items():
        tensors[part] = {}
        for key, (shape, own, columns) in expected.items():
            source, size = (part, _sent_as(part, own, dtype)), math.prod(shape)
            start = position[source]
            values = flat[source][start : start + size].to(own)
            tensors[part][key] = (
                turned(values.view(tuple(shape)[::-1])) if columns else values.view(tuple(shape))
            )
            position[source] = start + size
    return tensors


def bytes_per_value(dtype: torch.dtype) -> float:
    """Bytes that a value takes when sent as a dtype."""
    return dtype.itemsize + (4 / BLOCK if dtype == torch.int8 else 0)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as it arrives when it is sent in half precision."""
    return tensor.to(dtype).to(tensor.dtype)


def _sent_as(part: str, own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return own if dtype is None or part == SELECTOR_PART else dtype


def _name(part: str, dtype: torch.dtype) -> str:
    return f"{part}.{str(dtype).removeprefix('torch.')}"


def _stored(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn values into what is put into an array."""
    if dtype == torch.int8:
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1) / 127
        steps = blocks / scales.clamp(min=torch.finfo(scales.dtype).tiny)[:, None]
        integers = steps.round().to(torch.int8).view(-1)[: len(flat)]
        return torch.cat([integers, scales.view(torch.int8)])
    flat = flat.to(dtype)
    return flat.view(torch.int16) if dtype == torch.bfloat16 else flat  # which numpy lacks


def _restored(array: Array, name: str, size: int, dtype: torch.dtype) -> Tensor:
    """Turn what is in an array back into values."""
    if dtype != torch.int8:
        return read_array(name, array, shape=[size], dtype=dtype)
    number = -(-size // BLOCK)
    stored = read_array(name, array, shape=[size + 4 * number], dtype=dtype)
    scales = stored[size:].clone().view(torch.float32)
    blocks = F.pad(stored[:size], (0, -size % BLOCK)).view(number, BLOCK)
    return (blocks * scales[:, None]).view(-1)[:size]
