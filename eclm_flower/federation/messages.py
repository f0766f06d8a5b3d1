"""What travels between cloud and device: plain Flower records, no pickle, matched by key.

==========  =======================================  ==========================================
message     cloud -> device                          device -> cloud
==========  =======================================  ==========================================
query       the selector's arrays, if importance is  metrics: device number, budget, importance
            wanted
train       the sub-model's arrays; config: the      the same arrays; metrics
            user's own, the modules of each layer,
            the batch norm policy
evaluate    as train                                 metrics
==========  =======================================  ==========================================

Arrays are keyed as in the modular model's state (``body.<key>``, ``selector.<key>``). Everything
the plugin adds to the user's one config record starts with ``eclm.``; a second record would break
Flower's own client mods. Integer buffers never travel: devices have them from their own copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from eclm_flower.adaptation.profile import Budget, DeviceProfile
from eclm_flower.errors import ReplyError, RequestError
from eclm_flower.modular.costs import RESOURCES, CostTable
from eclm_flower.modular.selection import Selection

BODY, SELECTOR = "body.", "selector."
BATCH_NORM = "eclm.batch-norm"
MODULES = "eclm.modules."
DEVICE = "eclm.device"
BUDGET = "eclm.budget."
IMPORTANCE = "eclm.importance."


def to_array(tensor: Tensor) -> Array:
    """Turn a tensor into a Flower array."""
    return Array(tensor.detach().cpu().contiguous().numpy())


def to_tensors(arrays: ArrayRecord, prefix: str = "") -> dict[str, Tensor]:
    """Turn the arrays whose keys start with `prefix` into tensors, keyed without it."""
    return {
        key.removeprefix(prefix): torch.from_numpy(np.array(array.numpy()))
        for key, array in arrays.items()
        if key.startswith(prefix)
    }


def selection_to_config(selection: Selection) -> dict[str, list[int]]:
    """Write a selection as config entries."""
    return {f"{MODULES}{layer}": list(modules) for layer, modules in selection.items()}


def selection_from_config(config: ConfigRecord) -> dict[str, tuple[int, ...]]:
    """Read a selection back; empty if there is none."""
    return {
        key.removeprefix(MODULES): tuple(cast(list[int], numbers))
        for key, numbers in config.items()
        if key.startswith(MODULES)
    }


def the_only(records: Mapping[str, object], kind: str) -> str:
    """Return the key of the only record of its kind."""
    if len(records) != 1:
        raise RequestError(f"Expected exactly one {kind} in the message, got {sorted(records)}.")
    return next(iter(records))


def profile_to_metrics(profile: DeviceProfile) -> MetricRecord:
    """Write a device's profile as metrics."""
    metrics: dict[str, int | float | list[float]] = {DEVICE: profile.device}
    for resource in RESOURCES:
        metrics[f"{BUDGET}{resource}"] = float(getattr(profile.budget, resource))
    for layer, importance in profile.importance.items():
        metrics[f"{IMPORTANCE}{layer}"] = [float(value) for value in importance]
    return MetricRecord(metrics)  # type: ignore[arg-type]


def profile_from_content(content: RecordDict, costs: CostTable | None = None) -> DeviceProfile:
    """Read a device's profile.

    Parameters
    ----------
    content : RecordDict
        The reply's content.
    costs : CostTable, optional
        With it, importance of a wrong length is refused.

    Raises
    ------
    ReplyError
        A part is missing, of the wrong type or length, or importance is not a distribution.
    """
    metrics = {
        key: value for record in content.metric_records.values() for key, value in record.items()
    }
    device = metrics.get(DEVICE)
    if not isinstance(device, int):
        raise ReplyError(f"Expected an integer {DEVICE} in a device's profile, got {device!r}.")
    try:
        budget = Budget(**{name: float(metrics[f"{BUDGET}{name}"]) for name in RESOURCES})  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"Device {device} reported no usable budget: {error}.") from error
    importance = {
        key.removeprefix(IMPORTANCE): np.asarray(value, dtype=np.float64)
        for key, value in metrics.items()
        if key.startswith(IMPORTANCE)
    }
    for layer, values in importance.items():
        if not (np.isfinite(values).all() and (values >= 0).all() and abs(values.sum() - 1) < 1e-3):
            raise ReplyError(f"Device {device}'s importance in '{layer}' is not a distribution.")
    if importance and costs is not None:
        sizes = {layer: values.shape for layer, values in importance.items()}
        expected = {layer: (number,) for layer, number in costs.modules.items()}
        if sizes != expected:
            raise ReplyError(f"Device {device} reported importance of sizes {sizes}.")
    return DeviceProfile(device=device, budget=budget, importance=importance)
