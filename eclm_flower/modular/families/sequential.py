"""Layers in a row: neurons between two linear layers, channels between two convolutions.

This covers multi-layer perceptrons, those inside ViT, Swin and ConvNeXt, and VGG.

Layers are taken in disjoint pairs, so that the cost of a module is additive: of Linear-1, Linear-2,
Linear-3 the neurons between 1 and 2 are modular and Linear-3 is the shared head. A 3-layer MLP thus
has one module layer, as in the paper (section 6, HAR).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torchvision.models.vision_transformer import MLPBlock
from torchvision.ops.misc import MLP

from eclm_flower.modular.between import is_dense, split_between
from eclm_flower.modular.families import register
from eclm_flower.modular.split import Split

# What acts on each neuron or channel alone and has no tensors.
_PER_UNIT = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Softplus,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
)


@register(nn.Sequential, MLP, MLPBlock)
def split_sequential(block: nn.Sequential) -> list[Split]:
    """Split the hidden units between each disjoint pair of linear layers or convolutions."""
    return split_pairs(block, in_a_row(block))


def in_a_row(block: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    """Name and layer of every step; `named_children` leaves out later uses of the same layer."""
    return zip(block._modules, block, strict=True)


def split_pairs(block: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> list[Split]:
    """Split the hidden units between each disjoint pair of dense layers of the same kind.

    Parameters
    ----------
    block : nn.Module
        The block that holds the layers.
    layers : iterable of (name, layer)
        Layers of the block that run one after another.
    """
    splits = []
    into: list[str] = []
    opened: nn.Module | None = None  # the dense layer that makes the units of `into`
    for name, layer in layers:
        if is_dense(layer):
            if into and isinstance(opened, nn.Linear) == isinstance(layer, nn.Linear):
                splits.append(split_between(block, into=into, out_of=name))
                into = []
            else:
                into, opened = [name], layer
        elif into and isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.Conv2d):
            into.append(name)  # a convolution that is not dense is grouped or depthwise
        elif not isinstance(layer, _PER_UNIT):
            into = []  # e.g. a layer norm: it mixes the units, so this pair can't be cut
    return splits
