"""torchvision's inverted residuals and RegNet's bottlenecks: expanded channels become modules.

Between expansion and projection stands a depthwise convolution (RegNet: a grouped one), which acts
on each channel (group) alone. A block that does not expand (MobileNetV2's first) stays whole.

A squeeze-and-excite there (MobileNetV3, EfficientNet, RegNetY) scales every channel by a function
of all channels, so modules can't be told apart and the block is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torchvision.models import efficientnet, mobilenetv2, mobilenetv3, regnet
from torchvision.ops import SqueezeExcitation

from eclm_flower.errors import CoupledUnitsError
from eclm_flower.modular.families import register
from eclm_flower.modular.families.sequential import in_a_row, split_pairs
from eclm_flower.modular.split import Split


@register(mobilenetv2.InvertedResidual)
def split_v2(block: mobilenetv2.InvertedResidual) -> list[Split]:
    """Split the expanded channels of MobileNetV2's block."""
    return _split(block, "conv")


@register(mobilenetv3.InvertedResidual, efficientnet.MBConv, efficientnet.FusedMBConv)
def split_v3(block: nn.Module) -> list[Split]:
    """Split the expanded channels of MobileNetV3's and EfficientNet's blocks."""
    return _split(block, "block")


@register(regnet.ResBottleneckBlock)
def split_regnet(block: regnet.ResBottleneckBlock) -> list[Split]:
    """Split the groups of RegNet's bottleneck."""
    return _split(block, "f")


def _split(block: nn.Module, path: str) -> list[Split]:
    layers = list(_flattened(path, block.get_submodule(path)))
    for name, layer in layers:
        if isinstance(layer, SqueezeExcitation):
            raise CoupledUnitsError(
                f"its squeeze-and-excite '{name}' scales each hidden channel by a function of all "
                "of them."
            )
    return split_pairs(block, layers)


def _flattened(name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and layer of all that a nest of `nn.Sequential` runs one after another."""
    if isinstance(layer, nn.Sequential):
        for child_name, child in in_a_row(layer):
            yield from _flattened(f"{name}.{child_name}", child)
    else:
        yield name, layer
