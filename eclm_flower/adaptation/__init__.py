"""The online stage, pure: device profile, derivation, merge (paper section 5)."""

from eclm_flower.adaptation.class_prior import class_prior
from eclm_flower.adaptation.derivation import derive, derive_all
from eclm_flower.adaptation.merge import Weighting, merge
from eclm_flower.adaptation.outliers import Limits
from eclm_flower.adaptation.profile import Budget, DeviceProfile, Importance
from eclm_flower.adaptation.resizing import Resizable
from eclm_flower.adaptation.robust import Robust
from eclm_flower.adaptation.update import Update, check_update

__all__ = [
    "Budget",
    "DeviceProfile",
    "Importance",
    "Limits",
    "Resizable",
    "Robust",
    "Update",
    "Weighting",
    "check_update",
    "class_prior",
    "derive",
    "derive_all",
    "merge",
]
