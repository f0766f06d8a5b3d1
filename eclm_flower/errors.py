"""Every error eclm-flower raises on purpose: each names the cause, the value and the remedy."""

from typing import Literal


class EclmError(Exception):
    """Base of all errors raised on purpose by eclm-flower."""


class ModularizationError(EclmError, ValueError):
    """The model, or a part of it, cannot be cut into modules as asked."""


class CoupledUnitsError(ModularizationError):
    """A block's hidden units act on each other, so that no cut of it is exact."""


class SelectionError(EclmError, ValueError):
    """A selection names layers or modules that do not exist, or leaves a layer empty."""


class InfeasibleBudgetError(EclmError, ValueError):
    """A budget is too small for one module in every layer.

    Attributes
    ----------
    missing : dict[str, float]
        What is missing of each resource: bytes, FLOPs, bytes.
    """

    def __init__(self, message: str, missing: dict[str, float]) -> None:
        super().__init__(message)
        self.missing = missing


class PrototypingError(EclmError, ValueError):
    """The offline stage was given data or parameters it cannot work with."""


Reason = Literal[
    "arrays",
    "budget",
    "device",
    "dtype",
    "examples",
    "importance",
    "keys",
    "metrics",
    "mixture",
    "modules",
    "norm",
    "not-finite",
    "records",
    "shape",
    "size",
]
"""Why a reply is refused, in one word; the round's metrics count by it (docs/robustness.md)."""


class ReplyError(EclmError, ValueError):
    """A device's reply is broken: it is refused and the round goes on without it.

    Attributes
    ----------
    reason : str
        Why, in one word of `Reason`; the message says it in a sentence.
    """

    def __init__(self, message: str, reason: Reason) -> None:
        # It quotes what a device sent: that must not flood the log.
        super().__init__(message if len(message) <= 400 else f"{message[:400]} ...")
        self.reason: Reason = reason


class RequestError(EclmError, ValueError):
    """A message that reached a device does not carry what this plugin's server sends."""


class NodeConfigError(EclmError, ValueError):
    """A SuperNode's ``--node-config`` holds no usable budget."""


class WrappedStrategyError(EclmError, TypeError):
    """Something drives the ECLM strategy that can't work with devices' different sub-models."""


class CheckpointError(EclmError, ValueError):
    """A checkpoint can't be used: damaged, or of another model, format or setting."""
