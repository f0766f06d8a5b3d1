"""The declared policy for batch norm, on devices and in merging.

Devices hold little, skewed data and different modules. Statistics computed there describe a mixture
nobody asked for, and averaging them is how sub-model methods silently break.

- ``"frozen"`` (default): on devices, batch norm always uses the cloud's running statistics, even
  after ``model.train()``; its scale and shift are trained and merged like any parameter.
- ``"merged"``: batch norm behaves as usual on devices; running means and variances are merged with
  the weights of the tensors beside them. This is what FedAvg does.

Either way integer buffers (``num_batches_tracked``) stay as they are in the cloud.
"""

from __future__ import annotations

from typing import Literal, Self, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNormPolicy = Literal["frozen", "merged"]


class _Frozen:
    """Mixed into a batch norm class: train mode never reaches it."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)  # type: ignore[misc,no-any-return]

    def __reduce__(self) -> tuple[object, ...]:
        # The class is made while running: to pickle it by name would not find it.
        return _new_frozen, (type(self).__bases__[1],), self.__dict__


_frozen_classes: dict[type, type] = {}


def _frozen_class(kind: type) -> type:
    if kind not in _frozen_classes:
        _frozen_classes[kind] = type(kind.__name__, (_Frozen, kind), {})
    return _frozen_classes[kind]


def _new_frozen(kind: type) -> object:
    return object.__new__(_frozen_class(kind))


def apply_policy(model: nn.Module, policy: BatchNormPolicy) -> nn.Module:
    """Make every batch norm of `model` follow the policy, in place; returns `model`."""
    if policy not in get_args(BatchNormPolicy):
        raise ValueError(f"Expected batch norm policy {get_args(BatchNormPolicy)}, got {policy!r}.")
    if policy == "frozen":
        for layer in model.modules():
            if isinstance(layer, _BatchNorm) and not isinstance(layer, _Frozen):
                layer.__class__ = _frozen_class(type(layer))
                layer.eval()
    return model


def batch_sizes(samples: int, batch_size: int, model: nn.Module) -> list[int]:
    """Divide the samples of an epoch into batches, of which the last may be smaller.

    Batch norm that is not frozen has nothing to norm by in a batch of one sample. Where `model`,
    in the mode it is in, has some, a single last sample joins the batch before it.
    """
    sizes = [batch_size] * (samples // batch_size)
    rest = samples % batch_size
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if rest == 1 and sizes and any(norm.training for norm in norms):
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes
