"""eclm-flower: edge-cloud collaborative learning (ECLM / Nebula, ICPP 2024) for Flower.

A cloud model is cut into modules; every device gets the modules that matter for its data and fit
its budget, adapts them, and what returns is merged module by module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eclm_flower.adaptation import Budget as Budget
    from eclm_flower.adaptation import Limits as Limits
    from eclm_flower.adaptation import Resizable as Resizable
    from eclm_flower.adaptation import Robust as Robust
    from eclm_flower.adaptation import class_prior as class_prior
    from eclm_flower.federation import ECLM as ECLM
    from eclm_flower.federation import profile as profile
    from eclm_flower.federation import receive as receive
    from eclm_flower.federation import reply as reply
    from eclm_flower.federation import selection_of as selection_of
    from eclm_flower.modular import modularize as modularize
    from eclm_flower.prototyping import PrototypingConfig as PrototypingConfig
    from eclm_flower.prototyping import prototype as prototype

# Loaded when first used, so that the parts without Flower can be used without it.
_PUBLIC = {
    "Budget": "adaptation",
    "ECLM": "federation",
    "Limits": "adaptation",
    "PrototypingConfig": "prototyping",
    "Resizable": "adaptation",
    "Robust": "adaptation",
    "class_prior": "adaptation",
    "modularize": "modular",
    "profile": "federation",
    "prototype": "prototyping",
    "receive": "federation",
    "reply": "federation",
    "selection_of": "federation",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'eclm_flower' has no attribute {name!r}")
    return getattr(import_module(f"eclm_flower.{_PUBLIC[name]}"), name)
