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

BatchNormPolicy = Literal["frozen", "merged"]


class _Frozen:
    """Mixed into a batch norm class: train mode never reaches it."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)  # type: ignore[misc,no-any-return]


_frozen_classes: dict[type, type] = {}


def apply_policy(model: nn.Module, policy: BatchNormPolicy) -> nn.Module:
    """Make every batch norm of `model` follow the policy, in place; returns `model`."""
    if policy not in get_args(BatchNormPolicy):
        raise ValueError(f"Expected batch norm policy {get_args(BatchNormPolicy)}, got {policy!r}.")
    if policy == "frozen":
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(
                layer, _Frozen
            ):
                kind = type(layer)
                if kind not in _frozen_classes:
                    _frozen_classes[kind] = type(kind.__name__, (_Frozen, kind), {})
                layer.__class__ = _frozen_classes[kind]
                layer.eval()
    return model
