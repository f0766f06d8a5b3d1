"""What travels between cloud and device: plain Flower records, no pickle.

==========  =======================================  ==========================================
message     cloud -> device                          device -> cloud
==========  =======================================  ==========================================
query       the selector's arrays, if importance is  metrics: device number; budget and
            wanted; config: the user's own, and      importance, its sub-tasks if it knows them, or
            costs if the device is to derive         the modules it derived; digests of what its
                                                     cache holds
train       the sub-model's arrays; config: the      all arrays of the sub-model; metrics
            user's own, the modules of each layer,
            the batch norm policy; to a device with
            a cache only arrays it lacks, and what
            they are
evaluate    as train                                 metrics
==========  =======================================  ==========================================

How arrays are laid out: `eclm_flower.federation.wire`. Everything the plugin adds to the user's one
config record starts with ``eclm.``; a second record would break Flower's own client mods. Integer
buffers never travel: devices have them from their own copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy
from torch import Tensor

from eclm_flower.adaptation.profile import Budget, DeviceProfile
from eclm_flower.errors import ReplyError, RequestError, SelectionError
from eclm_flower.modular.costs import RESOURCES, Cost, CostTable
from eclm_flower.modular.selection import Selection, checked
from eclm_flower.modular.selector import DELTAS
from eclm_flower.modular.split import in_columns

BODY, SELECTOR, DELTAS_STATE = "body.", "selector.", "deltas."
BATCH_NORM = "eclm.batch-norm"
MODULES = "eclm.modules."
DEVICE = "eclm.device"
BUDGET = "eclm.budget."
IMPORTANCE = "eclm.importance."
MIXTURE = "eclm.mixture"  # proportions of the sub-tasks in a device's data
CACHED = "eclm.cached."  # digests of the modules in a device's cache, 0 for none
DERIVES = "eclm.derives"  # True: this device derives its sub-model, and tells no budget
INFEASIBLE = "eclm.infeasible"  # 1: it found none that fits
COSTS = "eclm.costs."  # bytes, FLOPs, bytes of a module of each layer; see `RESOURCES`
DIGESTS = "eclm.digests."  # digests of the modules of a sub-model, in the order of its selection
SENT = "eclm.sent."  # the modules of it that the message carries
# A letter a tensor of the body: s, shared; m, of modules; c, of modules, and travels in columns.
PARTS = "eclm.parts"
DOWNLOAD, UPLOAD = "eclm.download", "eclm.upload"  # dtypes, where they are not the tensors' own
_NPY = "numpy.ndarray"  # what Flower calls the npy format
SHARED = ""  # stands for the shared part where others are keyed by layer


def to_array(tensor: Tensor) -> Array:
    """Turn a tensor into a Flower array, in its order of memory.

    As Flower does, in the npy format, but it copies the values once and not twice.
    """
    tensor = tensor.detach().cpu()
    values = (tensor if in_columns(tensor) else tensor.contiguous()).numpy()
    header = BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(values))
    flat = values.reshape(-1, order="A").view(np.uint8)
    return Array(str(values.dtype), values.shape, _NPY, b"".join((header.getvalue(), flat.data)))


def in_rows(arrays: ArrayRecord) -> ArrayRecord:
    """Return arrays as users expect them, each in row-major order; the same objects if they are."""
    result = ArrayRecord()
    for key, array in arrays.items():
        values = array.numpy()
        result[key] = array if values.flags.c_contiguous else Array(np.ascontiguousarray(values))
    return result


def to_tensors(arrays: ArrayRecord, prefix: str = "") -> dict[str, Tensor]:
    """Turn the arrays whose keys start with `prefix` into tensors, keyed without it."""
    return {
        key.removeprefix(prefix): torch.from_numpy(np.array(array.numpy()))
        for key, array in arrays.items()
        if key.startswith(prefix)
    }


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def dtype_from_config(config: ConfigRecord, key: str) -> torch.dtype | None:
    """Read the dtype that values travel as; None: their own."""
    return DTYPES[str(config[key])] if key in config else None


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


def costs_to_config(costs: CostTable) -> dict[str, list[float]]:
    """Write a cost table as config entries: what tells a device to derive its sub-model itself."""
    parts = {SHARED: costs.shared, **costs.per_module}
    return {
        f"{COSTS}{name}": [float(getattr(cost, resource)) for resource in RESOURCES]
        for name, cost in parts.items()
    }


def costs_from_config(config: Mapping[str, object], whole: CostTable) -> CostTable | None:
    """Read a cost table back; None if there is none.

    Parameters
    ----------
    config : mapping
        The message's config.
    whole : CostTable
        The device's own table: it says which layers there are.
    """

    def cost(name: str) -> Cost:
        return Cost(
            **dict(zip(RESOURCES, cast(list[float], config[f"{COSTS}{name}"]), strict=True))
        )

    if f"{COSTS}{SHARED}" not in config:
        return None
    return replace(
        whole, shared=cost(SHARED), per_module={name: cost(name) for name in whole.per_module}
    )


def profile_to_metrics(profile: DeviceProfile) -> MetricRecord:
    """Write a device's profile as metrics.

    A device that derived its sub-model itself tells the modules, and nothing else of its own.
    """
    metrics: dict[str, int | float | list[int] | list[float]] = {DEVICE: profile.device}
    if profile.selection:
        metrics.update(selection_to_config(profile.selection))
    elif profile.infeasible:
        metrics[INFEASIBLE] = 1
    else:
        for resource in RESOURCES:
            metrics[f"{BUDGET}{resource}"] = float(getattr(profile.budget, resource))
        for layer, importance in profile.importance.items():
            metrics[f"{IMPORTANCE}{layer}"] = [float(value) for value in importance]
        if profile.mixture is not None:
            metrics[MIXTURE] = [float(value) for value in profile.mixture]
    for name, digests in profile.cached.items():
        metrics[f"{CACHED}{name}"] = list(digests)
    return MetricRecord(metrics)


def profile_from_content(
    content: RecordDict, costs: CostTable | None = None, *, sub_tasks: int = 0
) -> DeviceProfile:
    """Read a device's profile.

    Parameters
    ----------
    content : RecordDict
        The reply's content.
    costs : CostTable, optional
        With it, what does not fit the model's layers is refused.
    sub_tasks : int (default: 0)
        Number of sub-tasks with delta modules, which have an importance too.

    Raises
    ------
    ReplyError
        A part is missing, of the wrong type or length, importance or mixture is not a distribution,
        or modules are none of the model's.
    """
    metrics = {
        key: value for record in content.metric_records.values() for key, value in record.items()
    }
    device = metrics.get(DEVICE)
    if not isinstance(device, int) or not 0 <= device < 2**64:
        raise ReplyError(
            f"Expected an integer {DEVICE} from 0 to 2**64 - 1 in a device's profile, got "
            f"{device!r}.",
            "device",
        )
    cached = _read_cached(metrics, costs)
    if INFEASIBLE in metrics:
        return DeviceProfile(device=device, infeasible=True)
    if selection := _read_selection(device, metrics, costs):
        return DeviceProfile(device=device, selection=selection, cached=cached)
    try:
        budget = Budget(**{name: float(metrics[f"{BUDGET}{name}"]) for name in RESOURCES})  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError(
            f"Device {device} reported no usable budget: {error}.", "budget"
        ) from error
    sizes = None
    if costs is not None:
        sizes = {**costs.modules, **({DELTAS: sub_tasks} if sub_tasks else {})}
    return DeviceProfile(
        device=device,
        budget=budget,
        importance=_read_importance(device, metrics, sizes),
        mixture=_read_mixture(device, metrics, None if costs is None else sub_tasks),
        cached=cached,
    )


def _read_selection(
    device: int, metrics: Mapping[str, object], costs: CostTable | None
) -> dict[str, tuple[int, ...]]:
    """Read the modules a device derived itself; empty if it left that to the cloud."""
    told = {
        key.removeprefix(MODULES): value
        for key, value in metrics.items()
        if key.startswith(MODULES)
    }
    if not told or costs is None:
        return {}
    try:
        return checked(told, costs.modules)  # type: ignore[arg-type]
    except (SelectionError, TypeError, ValueError, OverflowError) as error:
        raise ReplyError(
            f"Device {device} asked for no sub-model there is: {error}", "modules"
        ) from error


def _read_cached(metrics: Mapping[str, object], costs: CostTable | None) -> dict[str, list[int]]:
    """Read the digests a device reports; a cache that doesn't fit the model is as good as none."""
    told = {
        key.removeprefix(CACHED): value
        for key, value in metrics.items()
        if key.startswith(CACHED) and isinstance(value, list)
    }
    sizes = {} if costs is None else {SHARED: 1, **costs.modules}
    if {name: len(digests) for name, digests in told.items()} != sizes:
        return {}
    return told


def _read_importance(
    device: int, metrics: Mapping[str, object], expected: Mapping[str, int] | None
) -> dict[str, np.ndarray]:
    """Read the importance in a device's profile: a distribution over each layer's modules."""
    told = {
        key.removeprefix(IMPORTANCE): value
        for key, value in metrics.items()
        if key.startswith(IMPORTANCE)
    }
    sizes = {
        layer: len(value) if isinstance(value, list) else None for layer, value in told.items()
    }
    if told and expected is not None and sizes != expected:
        raise ReplyError(
            f"Device {device} reported importance of sizes {sizes!r}, expected {dict(expected)}.",
            "importance",
        )
    importance = {}
    for layer, value in told.items():
        importance[layer] = np.asarray(value, dtype=np.float64)
        if not is_distribution(importance[layer]):
            raise ReplyError(
                f"Device {device}'s importance in {layer!r} is not a distribution.",
                "importance",
            )
    return importance


def _read_mixture(
    device: int, metrics: Mapping[str, object], sub_tasks: int | None
) -> np.ndarray | None:
    """Read the proportions of the sub-tasks that a device told; None if it told none."""
    if MIXTURE not in metrics:
        return None
    told = metrics[MIXTURE]
    length = len(told) if isinstance(told, list) else None
    if length is None or sub_tasks not in (None, length):
        raise ReplyError(
            f"Device {device} reported a mixture of {length} sub-tasks, expected {sub_tasks}.",
            "mixture",
        )
    mixture = np.asarray(told, dtype=np.float64)
    if not is_distribution(mixture):
        raise ReplyError(f"Device {device}'s mixture is not a distribution.", "mixture")
    return mixture


def is_distribution(values: np.ndarray) -> bool:
    """Whether numbers are at least 0 and add up to 1."""
    # NaN makes both comparisons false.
    return bool((values >= 0).all() and abs(values.sum() - 1) < 1e-3)
