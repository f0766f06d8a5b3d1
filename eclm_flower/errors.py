"""Every error eclm-flower raises on purpose: each names the cause, the value and the remedy."""


class EclmError(Exception):
    """Base of all errors raised on purpose by eclm-flower."""


class ModularizationError(EclmError, ValueError):
    """The model, or a part of it, cannot be cut into modules as asked."""


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


class ReplyError(EclmError, ValueError):
    """A device's reply is broken: it is refused and the round goes on without it."""


class RequestError(EclmError, ValueError):
    """A message that reached a device does not carry what this plugin's server sends."""
