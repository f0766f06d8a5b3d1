"""The device's module cache: what a device holds and the cloud has not changed is not sent again.

A *piece* is a module or the shared part. Its version is a digest of its values, so nothing has to
be agreed on: a cache that is old, of another run, or damaged just holds other digests, and what
doesn't match is sent. With its profile a device reports the digests it holds; the cloud answers
with the pieces that differ, and with the digests of all, which say what to take from the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eclm_flower.errors import RequestError
from eclm_flower.federation.messages import (
    BODY,
    DIGESTS,
    DOWNLOAD,
    SELECTOR,
    SENT,
    SHARED,
    dtype_from_config,
    selection_from_config,
)
from eclm_flower.federation.wire import (
    MODULES_PART,
    SELECTOR_PART,
    SHARED_PART,
    Form,
    unflattened,
)
from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.split import ModuleLayer, layer_by_key

Digests = Mapping[str, Sequence[int]]
"""Layer name -> digest of each module, ``[N]``; `SHARED` -> that of the shared part; 0: none."""


_PREFIXES = {SHARED_PART: BODY, SELECTOR_PART: SELECTOR}  # of keys in the shared piece


class ModuleCache:
    """Pieces of the cloud model as a device last received them, one file each.

    Parameters
    ----------
    folder : path
        Of this device alone; made when something is stored. Never larger than the cloud model: a
        piece replaces its older version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def digests(self, modules: Mapping[str, int]) -> dict[str, list[int]]:
        """Digests of what is held, computed from the files: a damaged one just does not match.

        Parameters
        ----------
        modules : dict[str, int]
            Layer name -> number of modules N of the cloud model.
        """
        return {
            name: [self._digest(name, module) for module in range(number)]
            for name, number in {SHARED: 1, **modules}.items()
        }

    def _digest(self, name: str, module: int) -> int:
        piece = self.load(name, module)
        return digest(piece) if piece else 0

    def get(self, name: str, module: int, expected: int) -> dict[str, Tensor]:
        """Return a piece.

        Raises
        ------
        RequestError
            It is not there, or no longer what the cloud was told.
        """
        piece = self.load(name, module)
        if not piece or digest(piece) != expected:
            what = f"module {module} of '{name}'" if name else "the shared part"
            raise RequestError(
                f"The cloud counts on {what} from the cache in {self.folder}, but it is gone or "
                "damaged. The next profile tells the cloud; nothing has to be done."
            )
        return piece

    def load(self, name: str, module: int) -> dict[str, Tensor]:
        """Return a piece as it is; empty if there is none, or none that can be read."""
        try:
            return load_file(self._path(name, module))
        except (OSError, SafetensorError):
            return {}

    def put(self, name: str, module: int, piece: Mapping[str, Tensor]) -> None:
        """Store a piece; whoever reads meanwhile sees the old one or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name, module)
        unfinished = path.with_suffix(".unfinished")
        save_file({key: tensor.contiguous() for key, tensor in piece.items()}, unfinished)
        unfinished.replace(path)

    def _path(self, name: str, module: int) -> Path:
        return self.folder / (f"{name}.{module}.safetensors" if name else "shared.safetensors")


def digest(piece: Mapping[str, Tensor]) -> int:
    """Digest of a piece's keys, shapes, dtypes and values: 1 to 2**63 - 1."""
    content = hashlib.blake2b(digest_size=8)
    for key in sorted(piece):
        tensor = piece[key].contiguous()
        content.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return max(1, int.from_bytes(content.digest(), "big") >> 1)


def module_piece(
    layer: ModuleLayer, state: Mapping[str, Tensor], position: int
) -> dict[str, Tensor]:
    """Cut one module out of a body's state.

    Parameters
    ----------
    layer : ModuleLayer
        Its layer.
    state : dict[str, Tensor]
        Body key -> tensor that holds some of the layer's modules.
    position : int
        Which of these.
    """
    return {
        key: layer.packed(key, state[key])[position]
        for key in layer.axes
        if key in state and state[key].is_floating_point()
    }


def digests_of(
    layers: Sequence[ModuleLayer], state: Mapping[str, Tensor], shared: Mapping[str, Tensor]
) -> dict[str, list[int]]:
    """Digest every piece of the cloud model.

    Parameters
    ----------
    layers : sequence of ModuleLayer
        Its module layers.
    state : dict[str, Tensor]
        Its body's state.
    shared : dict[str, Tensor]
        What travels of the shared part (with the selector, where that travels along).
    """
    return {
        SHARED: [digest(shared)],
        **{
            layer.name: [
                digest(module_piece(layer, state, module)) for module in range(layer.modules)
            ]
            for layer in layers
        },
    }


def lacking(
    selection: Selection, digests: Digests, cached: Digests
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[int]]]:
    """Say which pieces of a sub-model must travel to a device with a cache.

    Parameters
    ----------
    selection : dict[str, sequence of int]
        The sub-model's modules.
    digests, cached : dict[str, sequence of int]
        Of the cloud model's pieces, and of those the device reported.

    Returns
    -------
    dict[str, tuple of int]
        Layer name -> modules to send; ``{SHARED: (0,)}`` if the shared part is to be sent.
    dict[str, list of int]
        The config entries that tell the device.
    """
    send = {
        name: tuple(module for module in modules if digests[name][module] != cached[name][module])
        for name, modules in {SHARED: (0,), **selection}.items()
    }
    config = {f"{SENT}{name}": list(modules) for name, modules in send.items()}
    for name, modules in {SHARED: (0,), **selection}.items():
        config[f"{DIGESTS}{name}"] = [digests[name][module] for module in modules]
    return send, config


def complete(
    arrays: ArrayRecord,
    config: ConfigRecord,
    model: ModularModel,
    parts: Mapping[str, Mapping[str, Form]],
    cache: ModuleCache,
) -> dict[str, dict[str, Tensor]]:
    """Put a sub-model together from what came and what the cache holds; store what came.

    Parameters
    ----------
    arrays : ArrayRecord
        What came.
    config : ConfigRecord
        The message's, with the entries from `lacking`.
    model : ModularModel
        The device's copy of the modularised model.
    parts : dict[str, dict[str, Form]]
        Part -> key -> form of the whole sub-model's tensors; see `eclm_flower.federation.wire`.
    cache : ModuleCache
        The device's.

    Returns
    -------
    dict[str, dict[str, Tensor]]
        Part -> key -> tensor of the whole sub-model.

    Raises
    ------
    ReplyError
        What came is not what the config says.
    RequestError
        The cache lost what the cloud counts on.
    """
    layer_of = layer_by_key(model.layers.values())
    sent = {layer: _numbers(config, SENT, layer) for layer in (SHARED, *model.layers)}
    came = unflattened(
        arrays,
        {
            MODULES_PART: {
                key: form._replace(
                    shape=layer_of[key].narrowed_shape(key, form.shape, len(modules))
                )
                for key, form in parts[MODULES_PART].items()
                if (modules := sent[layer_of[key].name])
            },
            **{part: own for part, own in parts.items() if part != MODULES_PART and sent[SHARED]},
        },
        dtype_from_config(config, DOWNLOAD),
    )
    result: dict[str, dict[str, Tensor]] = {MODULES_PART: {}}
    for layer in model.layers.values():
        new = {
            module: module_piece(layer, came[MODULES_PART], position)
            for position, module in enumerate(sent[layer.name])
        }
        held = selection_from_config(config)[layer.name]
        pieces = [
            new[module] if module in new else cache.get(layer.name, module, expected)
            for module, expected in zip(held, _numbers(config, DIGESTS, layer.name), strict=True)
        ]
        for key in pieces[0]:
            form = parts[MODULES_PART][key]
            whole = torch.empty(*form.shape, dtype=form.dtype)
            layer.packed(key, whole).copy_(torch.stack([piece[key] for piece in pieces]))
            result[MODULES_PART][key] = whole
        for module, piece in new.items():
            cache.put(layer.name, module, piece)
    if sent[SHARED]:
        result |= {part: came[part] for part in parts if part != MODULES_PART}
        cache.put(SHARED, 0, shared_piece(result))
    else:
        piece = cache.get(SHARED, 0, _numbers(config, DIGESTS, SHARED)[0])
        for part, prefix in _PREFIXES.items():
            if part in parts:
                result[part] = {key: piece[f"{prefix}{key}"] for key in parts[part]}
    return result


def shared_piece(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name the tensors of the shared part, and of the selector where that travels along."""
    return {
        f"{prefix}{key}": tensor
        for part, prefix in _PREFIXES.items()
        for key, tensor in parts.get(part, {}).items()
    }


def _numbers(config: ConfigRecord, prefix: str, name: str) -> list[int]:
    return cast(list[int], config[f"{prefix}{name}"])
