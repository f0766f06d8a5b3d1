"""The unified module selector: which modules matter for an input (paper section 4.1).

One small embedding network h = embed(x) feeds the gate heads of ALL layers, so a device can score
modules it does not hold. The paper leaves the network open: ours are three strided convolutions for
images and one linear layer for everything else, as wide as `share` of the cloud model's bytes
allows. The heads start at zero: every module is equally likely until the selector is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eclm_flower.modular.split import ModuleLayer

DELTAS = "delta modules"
"""The selector's gates of delta modules, under this name among those of module layers."""

_WIDTHS = (64, 48, 32, 24, 16, 12, 8, 6, 4)


class ModuleSelector(nn.Module):
    """Embedding network and one gate head a module layer.

    Parameters
    ----------
    example_input : Tensor
        One input, ``[1, ...]``: images ``[1, C, y, x]``, anything else is flattened.
    layers : sequence of ModuleLayer
        The layers to gate.
    width : int
        Size of the embedding h.
    sub_tasks : int (default: 0)
        Number of sub-tasks that have delta modules: gates of their own, under `DELTAS`.

    Attributes
    ----------
    sizes : dict[str, int]
        Layer name -> number of modules N it has gates for; `DELTAS` among them if there are any.
    """

    def __init__(
        self,
        example_input: Tensor,
        layers: Sequence[ModuleLayer],
        width: int,
        sub_tasks: int = 0,
    ) -> None:
        super().__init__()
        self.sizes = {layer.name: layer.modules for layer in layers}
        if sub_tasks:
            self.sizes[DELTAS] = sub_tasks
        self.embed: nn.Module
        if example_input.ndim == 4:
            first = max(2, width // 4)
            self.embed = nn.Sequential(
                nn.Conv2d(example_input.shape[1], first, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(first, 2 * first, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(2 * first, width, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
        else:
            self.embed = nn.Sequential(
                nn.Flatten(), nn.Linear(example_input[0].numel(), width), nn.ReLU()
            )
        # The heads of all layers side by side: one matrix product for all gates.
        self.heads = nn.Linear(width, sum(self.sizes.values()))
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Score every module of every layer.

        Parameters
        ----------
        x : Tensor
            Inputs ``[B, ...]``.

        Returns
        -------
        dict[str, Tensor]
            Layer name -> logits ``[B, N]``.
        """
        logits = self.heads(self.embed(x)).split(list(self.sizes.values()), dim=1)
        return dict(zip(self.sizes, logits, strict=True))

    @torch.no_grad()
    def prefer_in_order(self, layer: str, *, by: float) -> None:
        """Gate a layer's modules alike for every input: each module less than the one before.

        Every device then wants the first modules, as many as it can pay for: nested sub-models.

        Parameters
        ----------
        layer : str
            Its name.
        by : float
            The gate of module i is proportional to ``exp(-by * i)``.
        """
        end = 0
        for name, size in self.sizes.items():
            start, end = end, end + size
            if name == layer:
                self.heads.weight[start:end] = 0
                self.heads.bias[start:end] = -by * torch.arange(size).to(self.heads.bias)


def build_selector(
    example_input: Tensor,
    layers: Sequence[ModuleLayer],
    *,
    model_bytes: int,
    share: float,
    sub_tasks: int = 0,
) -> ModuleSelector:
    """Build the widest selector whose parameters take at most `share` of `model_bytes`.

    A very small cloud model can't afford even the narrowest one; that one is built all the same,
    with a warning that says what it takes.
    """
    for width in _WIDTHS:
        selector = ModuleSelector(example_input, layers, width, sub_tasks)
        size = sum(p.numel() * p.element_size() for p in selector.parameters())
        if size <= share * model_bytes:
            return selector
    warnings.warn(
        f"The narrowest selector takes {size:,} bytes, {size / model_bytes:.1%} of the cloud "
        f"model's {model_bytes:,}, more than the share of {share:.1%} asked for.",
        stacklevel=3,
    )
    return selector


def top_k_gates(logits: Tensor, top_k: int | None = None) -> Tensor:
    """Turn logits into gates: softmax over the k largest, zero elsewhere (paper section 4.1).

    Parameters
    ----------
    logits : Tensor
        ``[B, N]``.
    top_k : int, optional
        Modules kept for each input; all when None.

    Returns
    -------
    Tensor
        ``[B, N]``, each row sums to 1.
    """
    if top_k is None or top_k >= logits.shape[1]:
        return F.softmax(logits, dim=1)
    kept, numbers = logits.topk(top_k, dim=1)
    return torch.zeros_like(logits).scatter(1, numbers, F.softmax(kept, dim=1))
