"""Noisy top-k gating and load balancing (Shazeer et al. 2017; paper section 4.2).

The noise is Gaussian of one given size, falling to zero over the training (the paper states no
schedule; Shazeer et al. learn it per input, which would double the gate heads a device downloads).
"""

from __future__ import annotations

import torch
from torch import Tensor


def noisy(logits: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add noise to logits ``[B, N]``, so that modules just below the top k are tried too."""
    if noise == 0:
        return logits
    eps = torch.randn(logits.shape, generator=generator).to(logits.device)
    return logits + noise * eps


def balance_loss(clean: Tensor, noised: Tensor, gates: Tensor, top_k: int, noise: float) -> Tensor:
    """Penalise layers in which few modules do all the work.

    Squared coefficient of variation of the modules' importance (sum of gates) plus that of their
    load (expected number of inputs that use them), Shazeer et al. 2017, equations 6 to 11.

    Parameters
    ----------
    clean, noised : Tensor
        Logits ``[B, N]`` before and after noise.
    gates : Tensor
        Gates ``[B, N]``.
    top_k : int
        Modules used by an input.
    noise : float
        Standard deviation of the noise; with none, load has no gradient and is left out.
    """
    loss = _squared_variation(gates.sum(dim=0))
    if noise > 0 and top_k < clean.shape[1]:
        # Module i is used if its noised logit exceeds the k-th largest of the others.
        largest = noised.topk(top_k + 1, dim=1).values
        inside = noised >= largest[:, top_k - 1 : top_k]
        threshold = torch.where(
            inside, largest[:, top_k : top_k + 1], largest[:, top_k - 1 : top_k]
        )
        used = torch.special.ndtr((clean - threshold) / noise)
        loss = loss + _squared_variation(used.sum(dim=0))
    return loss


def _squared_variation(values: Tensor) -> Tensor:
    return values.var(correction=0) / (values.mean() ** 2 + 1e-10)
