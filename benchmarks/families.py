"""What each family becomes, and how exactly: the table of docs/families.md.

Every model in its real width and depth (images of 64 pixels), with random weights and after five
steps of SGD on random data, in eval and in train mode::

    python -m benchmarks.families

Prints a Markdown table. *Cut*: largest difference between the outputs of the modularised and of the
untouched model, relative to the largest output. *Restricted*: the same between the sub-model of a
random half of each layer's modules and the whole model with the other gates at 0. *Effect*: the
same between that sub-model and the whole model, the least one seen, to show that the halves left
out matter. Dropout is off: a wide and a narrow tensor draw different masks.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torchvision import models

from eclm_flower.modular import ModularModel, modularize
from eclm_flower.modular.split import layer_by_key

BATCH, STEPS = 4, 5


@dataclass(frozen=True)
class Family:
    """A model and what a unit of it is."""

    unit: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)


def mlp() -> nn.Module:
    """Build a perceptron with one hidden pair of layers, as in the paper's activity recognition."""
    return nn.Sequential(
        *(nn.Linear(561, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 12))
    )


def transformer_encoder() -> nn.Module:
    """Build torch's encoder in the sizes of "Attention is all you need"."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return nn.TransformerEncoder(layer, 6)


def torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    """Name a model of torchvision, untrained."""
    return lambda: models.get_model(name, weights=None, **options)


_CHANNELS = "hidden channels"
_VGG = "channels between two convolutions; neurons of the classifier"
_HEADS = "attention heads; neurons"
FAMILIES = {
    **{n: Family(_CHANNELS, torchvision(n)) for n in ("resnet18", "resnet34")},
    **{n: Family("conv2's channels", torchvision(n)) for n in ("resnet50", "wide_resnet50_2")},
    "resnext50_32x4d": Family("groups", torchvision("resnext50_32x4d")),
    **{n: Family(_VGG, torchvision(n)) for n in ("vgg11", "vgg13_bn", "vgg16", "vgg19_bn")},
    "vit_b_16": Family(_HEADS, torchvision("vit_b_16", image_size=64)),
    "swin_t": Family(_HEADS, torchvision("swin_t")),
    "swin_v2_t": Family(_HEADS, torchvision("swin_v2_t")),
    # Its layer scale of 1e-6 would hide what the blocks of an untrained model do.
    "convnext_tiny": Family("expanded channels", torchvision("convnext_tiny", layer_scale=0.5)),
    "mobilenet_v2": Family("expanded channels", torchvision("mobilenet_v2")),
    "regnet_x_1_6gf": Family("groups", torchvision("regnet_x_1_6gf")),
    "densenet121": Family("conv1's channels", torchvision("densenet121")),
    "nn.TransformerEncoder": Family(_HEADS, transformer_encoder, (16, 512)),
    "nn.Sequential (MLP)": Family("neurons", mlp, (561,)),
}


def main(
    only: Annotated[str, typer.Option(help="Names with this in them.")] = "",
    modules: Annotated[int, typer.Option(help="Most modules a layer.")] = 16,
) -> None:
    """Print the table of families."""
    warnings.filterwarnings("ignore", ".*nested tensor|.*narrowest selector")
    print("| model | module | modules a layer | layers | sub-models | modular | cut | ", end="")
    print("restricted | effect | s |\n|---|---|---|---|---|---|---|---|---|---|")
    for name, family in FAMILIES.items():
        if only in name:
            print(f"| {name} | " + " | ".join(row(family, modules)) + " |", flush=True)


def row(family: Family, modules: int) -> list[str]:
    """Measure one family's row."""
    start = time.perf_counter()
    torch.manual_seed(0)
    body = family.build()
    for layer in body.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif isinstance(layer, nn.MultiheadAttention):
            layer.dropout = 0.0
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 0.5  # so few steps hardly move the statistics otherwise
    with torch.no_grad():
        for parameter in body.parameters():  # some heads start at zero
            parameter.add_(0.01 * torch.randn(parameter.shape))
    x = torch.randn(BATCH, *family.shape)
    train(body, family.shape, learning_rate=0.0)  # statistics of batch norm alone
    measured = [differences(body, x, modules, training) for training in (False, True)]
    train(body, family.shape, learning_rate=0.01)
    measured += [differences(body, x, modules, training) for training in (False, True)]
    cut, restricted, effect = zip(*measured, strict=True)

    model = modularize(body, modules_per_layer=modules, example_input=x[:1])
    numbers = [layer.modules for layer in model.layers.values()]
    parameters = dict(body.named_parameters())
    modular = layer_by_key(model.layers.values()).keys() & parameters.keys()
    share = sum(parameters[key].numel() for key in modular) / sum(
        p.numel() for p in parameters.values()
    )
    submodels = sum(math.log10(2**number - 1) for number in numbers)
    return [
        family.unit,
        ", ".join(str(number) for number in sorted(set(numbers))),
        str(len(numbers)),
        f"10^{submodels:.0f}",
        f"{share:.0%}",
        f"{max(cut):.0e}",
        f"{max(restricted):.0e}",
        f"{min(effect):.0e}",
        f"{time.perf_counter() - start:.0f}",
    ]


def train(body: nn.Module, shape: tuple[int, ...], *, learning_rate: float) -> None:
    """Train on random data for a few steps."""
    optimizer = torch.optim.SGD(body.parameters(), lr=learning_rate, momentum=0.9)
    body.train()
    for _ in range(STEPS):
        output = body(torch.randn(BATCH, *shape)).flatten(1)
        loss = F.cross_entropy(output, torch.arange(BATCH) % output.shape[1])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(body.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def differences(
    body: nn.Module, x: Tensor, modules: int, training: bool
) -> tuple[float, float, float]:
    """Cut a copy; return the differences *cut*, *restricted* and *effect*."""

    def run(forward: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)  # for stochastic depth
        return forward(x)

    def cut() -> ModularModel:  # anew each time: train mode changes batch norm's statistics
        own = copy.deepcopy(body).train(training)
        return modularize(own, modules_per_layer=modules, example_input=x[:1])

    original = run(copy.deepcopy(body).train(training))
    whole = run(cut())
    model = cut()
    selection, gates = half(model)
    sub_model = model.sub_model(selection)
    expected = run(lambda x: model.forward_gated(x, gates))
    got = run(sub_model)
    return difference(whole, original), difference(got, expected), difference(got, whole)


def half(model: ModularModel) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Choose a random half of each layer's modules; also as gates."""
    rng = np.random.default_rng(0)
    selection, gates = {}, {}
    for name, layer in model.layers.items():
        chosen = np.sort(rng.choice(layer.modules, layer.modules // 2, replace=False))
        selection[name] = chosen.tolist()
        gates[name] = torch.zeros(1, layer.modules).index_fill(1, torch.from_numpy(chosen), 1.0)
    return selection, gates


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest output."""
    return float((got - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_show_locals=False)
    app.command()(main)
    app()
