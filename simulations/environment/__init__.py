"""Who sees which data: how a data set is divided, how a device's data moves, how it looks."""

from simulations.environment.environment import DeviceData, Environment
from simulations.environment.feature_shift import FeatureShift
from simulations.environment.kept_back import for_validation

__all__ = ["DeviceData", "Environment", "FeatureShift", "for_validation"]
