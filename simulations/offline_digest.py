"""What a prepared cloud model depends on, as a few characters of its file's name.

Runs share prepared models by file name, so the name must tell apart whatever could make two models
differ. It is not built from a list of options, which somebody would forget to extend, but from what
training is really given: the initial model, every sample and sub-task of the proxy data, the very
configuration object, and the source of the code that trains.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import eclm_flower.adaptation
import eclm_flower.modular
import eclm_flower.prototyping
import strategies
from eclm_flower import PrototypingConfig
from eclm_flower.modular import ModularModel
from eclm_flower.prototyping.proxy import Augment
from simulations import augmentation, models

_CODE = (
    eclm_flower.adaptation,
    eclm_flower.modular,
    eclm_flower.prototyping,
    augmentation,
    models,
)
_LENGTH = 16  # characters: 64 bits


def digest_of_start(
    model: ModularModel,
    data: TensorDataset,
    sub_tasks: Tensor,
    config: PrototypingConfig,
    augment: Augment | None,
    compute: str,
) -> str:
    """Digest what the training of a whole model is given.

    Parameters
    ----------
    model : ModularModel
        Before it is trained.
    data : TensorDataset
        Proxy data: ``(x [n, ...], y [n])``.
    sub_tasks : Tensor
        int64 ``[n]``.
    config : PrototypingConfig
        The object that training gets.
    augment : callable, optional
    compute : str
        Where it is trained: a GPU adds up in another order.
    """
    parts: list[object] = [torch.__version__, compute, repr(model), sorted(asdict(config).items())]
    parts += [repr(list(model.layers.values())), model.gating, model.top_k, model.batch_size]
    parts += [getattr(augment, "__qualname__", None), source_digest(_CODE)]
    tensors = {**model.state_dict(), "x": data.tensors[0], "y": data.tensors[1], "s": sub_tasks}
    for name, tensor in tensors.items():
        parts += [name, tuple(tensor.shape), str(tensor.dtype), _digest_of(tensor)]
    return _digest(parts)


def digest_of_kind(start: str, kind: str, config: PrototypingConfig) -> str:
    """Digest what the preparation of a kind of method is given, beside the trained whole model.

    Parameters
    ----------
    start : str
        Digest of that model.
    kind : str
        See `strategies.offline`.
    config : PrototypingConfig
        The object that the preparation gets.
    """
    code = source_digest((strategies,))
    return _digest([start, kind, sorted(asdict(config).items()), code])


@cache
def source_digest(modules: tuple[ModuleType, ...]) -> str:
    """Digest the source files of modules, of packages all of them."""
    parts: list[object] = []
    for module in modules:
        path = Path(str(module.__file__))
        files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
        parts += [(str(file.relative_to(path.parent)), file.read_text()) for file in files]
    return _digest(parts)


def _digest_of(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().numpy()
    return hashlib.blake2b(values.tobytes()).hexdigest()


def _digest(parts: list[object]) -> str:
    return hashlib.blake2b(repr(parts).encode()).hexdigest()[:_LENGTH]
