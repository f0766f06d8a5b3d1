"""The offline stage, in the cloud: training, sub-task assignment, ability enhancing (section 4)."""

from eclm_flower.prototyping.assignment import assign, gate_targets
from eclm_flower.prototyping.config import PrototypingConfig
from eclm_flower.prototyping.prototype import PrototypingReport, accuracy, prototype

__all__ = [
    "PrototypingConfig",
    "PrototypingReport",
    "accuracy",
    "assign",
    "gate_targets",
    "prototype",
]
