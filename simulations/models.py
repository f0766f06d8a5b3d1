"""The cloud models of the simulations, by name."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, cast

import torch
from torch import nn
from torchvision.models import resnet18, resnet34, vgg16_bn

from eclm_flower.modular import slim_resnet
from simulations.settings import SettingsError

Shape = tuple[int, ...]


def _mlp(shape: Shape, num_classes: int) -> nn.Module:
    """Build the paper's 3-layer MLP: one module layer between the first two linear layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(shape), 256),
        nn.ReLU(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def _slim_resnet(shape: Shape, num_classes: int) -> nn.Module:
    return slim_resnet(num_classes=num_classes, in_channels=_channels(shape))


def _resnet(build: Callable[..., nn.Module]) -> Callable[[Shape, int], nn.Module]:
    def small_image_resnet(shape: Shape, num_classes: int) -> nn.Module:
        """Build torchvision's ResNet with the usual stem for small images: 3x3, no pooling."""
        model = build(num_classes=num_classes)
        model.conv1 = nn.Conv2d(_channels(shape), 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model

    return small_image_resnet


def _vgg16(shape: Shape, num_classes: int) -> nn.Module:
    """Build torchvision's VGG16 with batch norm, and the usual head for small images: one layer."""
    model: Any = vgg16_bn(num_classes=num_classes)
    model.features[0] = nn.Conv2d(_channels(shape), 64, 3, padding=1)
    model.features[-1] = nn.AdaptiveMaxPool2d(1)  # of 32x32 photographs: torchvision's own
    model.avgpool = nn.Identity()
    model.classifier = nn.Linear(512, num_classes)
    return cast(nn.Module, model)


def _channels(shape: Shape) -> int:
    if len(shape) != 3:
        raise SettingsError(
            f"Expected images [channels, y, x] for a convolutional model, got samples of shape "
            f"{list(shape)}; use --model mlp."
        )
    return shape[0]


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": _mlp,
    "slim-resnet": _slim_resnet,
    "resnet18": _resnet(resnet18),
    "resnet34": _resnet(resnet34),
    "vgg16": _vgg16,
}


def build_model(name: str, shape: Shape, num_classes: int, *, seed: int) -> nn.Module:
    """Build a cloud model, its initial weights drawn from `seed`.

    Parameters
    ----------
    name : str
        A key of `MODELS`, or "auto": an MLP for vectors and tiny images, the slim ResNet for
        larger ones.
    shape : tuple of int
        Shape of one sample.
    num_classes : int
        Classes of the head.
    seed : int
        Of the initial weights.
    """
    if name == "auto":
        name = "slim-resnet" if len(shape) == 3 and min(shape[1:]) >= 16 else "mlp"
    if name not in MODELS:
        raise SettingsError(f"Expected --model from auto, {', '.join(MODELS)}, got '{name}'.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](shape, num_classes)
