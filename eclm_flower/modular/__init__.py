"""What a modular model is: blocks, module layers, selector, sub-models, costs."""

from eclm_flower.modular.batch_norm import BatchNormPolicy, apply_policy
from eclm_flower.modular.costs import RESOURCES, Cost, CostTable
from eclm_flower.modular.families.slim_resnet import SlimResNet, slim_resnet
from eclm_flower.modular.model import Gating, ModularModel, modularize
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.selector import ModuleSelector, top_k_gates
from eclm_flower.modular.split import ModuleLayer, Split, split_between

__all__ = [
    "RESOURCES",
    "BatchNormPolicy",
    "Cost",
    "CostTable",
    "Gating",
    "ModularModel",
    "ModuleLayer",
    "ModuleSelector",
    "Selection",
    "SlimResNet",
    "Split",
    "apply_policy",
    "modularize",
    "slim_resnet",
    "split_between",
    "top_k_gates",
]
