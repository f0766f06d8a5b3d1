"""The online stage, pure: device profile, derivation, merge (paper section 5)."""

from eclm_flower.adaptation.derivation import derive
from eclm_flower.adaptation.merge import Update, Weighting, check_update, merge
from eclm_flower.adaptation.profile import Budget, DeviceProfile, Importance

__all__ = [
    "Budget",
    "DeviceProfile",
    "Importance",
    "Update",
    "Weighting",
    "check_update",
    "derive",
    "merge",
]
