"""torchvision's basic residual block (ResNet18, ResNet34): conv1's output channels become modules.

`bn1` acts on each hidden channel alone and belongs to the modules; `bn2` spans them and is shared.
"""

from __future__ import annotations

from torchvision.models.resnet import BasicBlock

from eclm_flower.modular.families import register
from eclm_flower.modular.split import Split, split_between


@register(BasicBlock)
def split_basic_block(block: BasicBlock) -> list[Split]:
    """Split the hidden channels between conv1 and conv2."""
    return [split_between(block, into=["conv1", "bn1"], out_of="conv2")]
