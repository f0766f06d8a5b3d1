"""What all tests share: one thread, Flower's log, no time limits for examples, two builders."""

import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import nn

torch.set_num_threads(1)
settings.register_profile("eclm", deadline=None)
settings.load_profile("eclm")


@pytest.fixture(autouse=True)
def _as_at_the_start():
    """Programs set threads and quieten Flower's log for their process: every test undoes it."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.DEBUG)  # as Flower leaves it


@pytest.fixture(scope="session")
def perturb() -> Callable[..., nn.Module]:
    """Move every parameter and statistic, as training would: equal tensors hide mix-ups."""

    @torch.no_grad()
    def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.add_(3)
            elif not tensor.is_floating_point():
                continue  # an index into a table
            elif name.endswith("running_var"):
                tensor.mul_(0.5 + torch.rand(tensor.shape, generator=generator))
            else:
                spread = 0.3 * tensor.std() if tensor.ndim > 1 and tensor.any() else 0.1
                tensor.add_(spread * torch.randn(tensor.shape, generator=generator))
        return model

    return perturb


@pytest.fixture(scope="session")
def small_mlp(perturb: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    """Build an MLP with a batch norm: the smallest model that has every kind of tensor."""

    def small_mlp() -> nn.Module:
        torch.manual_seed(0)
        return perturb(
            nn.Sequential(
                nn.Linear(6, 8),
                nn.BatchNorm1d(8),
                nn.ReLU(),
                nn.Linear(8, 12),
                nn.ReLU(),
                nn.Linear(12, 8),
                nn.GELU(),
                nn.Linear(8, 3),
            )
        ).eval()

    return small_mlp
