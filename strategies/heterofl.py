"""HeteroFL (Diao, Ding, Tarokh, ICLR 2021) with everything its authors run it with.

- **Levels**: a device trains a prefix of 1, 1/2, 1/4, 1/8, ... of every layer's hidden units, the
  widest level its budget allows. The authors narrow stem and head too; here, as for every method,
  these are the shared part.
- **Scaler**: hidden units are divided by the level. The authors do so in training only, because
  they test the whole model; a device here tests its sub-model, so it scales there as well.
- **Static batch norm**: training uses each batch's own statistics and keeps none. The authors then
  ask all devices for statistics under the merged model; here a device adds those of its data under
  the model it trained to its reply, and they are merged like any tensor.
- **Masked cross-entropy**: logits of classes a device lacks are set to zero in training.
- **Head rows**: a class's row of the head is merged over the devices that have the class. With the
  mask all others return that row as they got it, so the cloud can tell without being told.
- **Clipping**: gradients are clipped to norm 1; the scaler makes them large.

The authors also decay the learning rate over hundreds of rounds and weight decay; here devices
train as in every other method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import Message
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import TensorDataset

from eclm_flower import receive
from eclm_flower.adaptation import DeviceProfile, Update
from eclm_flower.modular import ModularModel, Selection
from eclm_flower.modular.batch_norm import batch_sizes
from eclm_flower.modular.split import layer_by_key
from strategies.local_training import Training, train
from strategies.method import Method
from strategies.nested import Nested
from strategies.scaler import scale_hidden_units
from strategies.windows import numbers_within, window


class HeteroFL(Nested):
    """Prefixes by level; head rows merged from the devices that have the class."""

    def derive(self, profile: DeviceProfile, server_round: int) -> Selection:
        """Choose the widest level that a device's budget allows."""
        costs = self.model.costs
        halvings = max(costs.modules.values()).bit_length()
        levels = [0.5**halved for halved in range(halvings)]
        return window(costs, numbers_within(costs, profile.budget, shares=levels))

    def merge(self, updates: Iterable[Update]) -> dict[str, Tensor]:
        """Merge as ever, but the head row by row."""
        updates = list(updates)
        rows = {key: merge_rows(self.state[key], updates, key) for key in head_keys(self.model)}
        return {**super().merge(updates), **rows}


def head_keys(model: ModularModel) -> list[str]:
    """State keys of the last linear layer, as far as they belong to the shared part."""
    modular = layer_by_key(model.layers.values()).keys()
    *_, head = (name for name, part in model.body.named_modules() if isinstance(part, nn.Linear))
    keys = {f"{head}.weight", f"{head}.bias"} & model.body.state_dict().keys()
    return sorted(keys - modular)


def merge_rows(before: Tensor, updates: Sequence[Update], key: str) -> Tensor:
    """Average each row over the updates that changed it, by number of examples.

    Parameters
    ----------
    before : Tensor
        ``[C, ...]``, as devices got it. Rows that nobody changed stay so.
    updates : sequence of Update
        What came back.
    key : str
        Which of their tensors.
    """
    after = torch.stack([update.state[key] for update in updates])  # [U, C, ...]
    changed = (after != before).flatten(2).any(dim=2) if after.ndim > 2 else after != before
    examples = torch.tensor([update.num_examples for update in updates], dtype=torch.float64)
    weights = examples[:, None] * changed
    weights = weights / weights.sum(dim=0).clamp(min=torch.finfo(weights.dtype).tiny)
    shape = (*weights.shape, *(1,) * (after.ndim - 2))
    mean = (weights.view(shape) * after).sum(dim=0).to(before.dtype)
    return torch.where(changed.any(dim=0).view(shape[1:]), mean, before)


def masked_cross_entropy(logits: Tensor, y: Tensor, *, present: Tensor) -> Tensor:
    """Cross-entropy with the logits of classes that aren't in `present` at zero."""
    absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    absent[present] = False
    return F.cross_entropy(logits.masked_fill(absent, 0.0), y)


def _receive(msg: Message, model: ModularModel, **options: Any) -> nn.Module:
    sub_model = receive(msg, model, **options)
    scale_hidden_units(sub_model, model.layers.values())
    for layer in _batch_norms(sub_model):
        layer.track_running_stats = False  # its statistics still serve in eval mode
    return sub_model


def _adapt(
    model: nn.Module, data: TensorDataset, settings: Training, generator: torch.Generator
) -> float:
    x, y = data.tensors
    loss = partial(masked_cross_entropy, present=y.unique())  # type: ignore[no-untyped-call]
    result = train(model, data, settings, generator, loss=loss, clip_norm=1.0)
    _collect_statistics(model, x, settings.batch_size)
    return result


@torch.no_grad()
def _collect_statistics(model: nn.Module, x: Tensor, batch_size: int) -> None:
    """Replace batch norm statistics by the mean of those of all batches."""
    layers = _batch_norms(model)
    if not layers:
        return
    for layer in layers:
        layer.track_running_stats, layer.momentum = True, None
        layer.reset_running_stats()
    model.train()
    for batch in torch.split(x, batch_sizes(len(x), batch_size, model)):
        model(batch)
    for layer in layers:
        layer.track_running_stats = False


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


METHOD = Method(
    name="heterofl",
    strategy=partial(HeteroFL, batch_norm="merged"),
    offline="scaled",
    receive=_receive,
    adapt=_adapt,
)
