"""Multi-layer perceptrons written as `nn.Sequential`: hidden neurons become modules.

Linear layers are taken in disjoint pairs, so that the cost of a module is additive: of
Linear-1, Linear-2, Linear-3 the neurons between 1 and 2 are modular and Linear-3 is the shared
head. A 3-layer MLP thus has one module layer, as in the paper (section 6, HAR).
"""

from __future__ import annotations

from torch import nn

from eclm_flower.modular.families import register
from eclm_flower.modular.split import Split, split_between

_PER_UNIT = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Softplus,
    nn.Dropout,
    nn.Identity,
    nn.BatchNorm1d,
)


@register(nn.Sequential)
def split_mlp(block: nn.Sequential) -> list[Split]:
    """Split the hidden neurons between each disjoint pair of linear layers."""
    splits = []
    into: list[str] = []
    for name, layer in block.named_children():
        if isinstance(layer, nn.Linear) and into:
            splits.append(split_between(block, into=into, out_of=name))
            into = []
        elif isinstance(layer, nn.Linear):
            into = [name]
        elif into and isinstance(layer, nn.BatchNorm1d):
            into.append(name)
        elif not isinstance(layer, _PER_UNIT):
            into = []  # e.g. a layer norm: it mixes the neurons, so this pair can't be cut
    return splits
