"""A nested model for each cluster of devices (after IFCA: Ghosh et al., NeurIPS 2020).

The cloud keeps `CLUSTERS` models. A device is sent its prefix of each, keeps the one of least loss
on its training data, trains it and returns it; the cloud merges each model from the devices that
chose it. All transfers are counted; the budget limits each of them, and what is trained.

The authors start from different random models. Here all start from the same prepared model, as
every method does; while several are equally good a device takes one of them at random, and so they
grow apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from eclm_flower import receive, reply
from eclm_flower.adaptation import DeviceProfile, Update, merge
from eclm_flower.federation.client import selection_of
from eclm_flower.modular import ModularModel, Selection
from eclm_flower.modular.modes import evaluating
from strategies.method import Method
from strategies.nested import Nested
from strategies.windows import numbers_within, window

CLUSTERS = 4
Value = TypeVar("Value")
_CHOSEN = "cluster"  # metric of a reply


class Bodies(nn.ModuleList):
    """The bodies of all clusters, of which one is in use.

    Attributes
    ----------
    chosen : int
        Which one.
    """

    chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``[B, ...]`` to logits ``[B, C]`` with the body in use."""
        return self[self.chosen](x)  # type: ignore[no-any-return]


class ClusteredModel(ModularModel):
    """A modular model of one body a cluster, all alike; layers are named ``<cluster>.<layer>``.

    Its costs are those of all clusters together; a device uses one of them.

    Parameters
    ----------
    model : ModularModel
        What the bodies are copies of; its selector is shared.
    """

    def __init__(self, model: ModularModel) -> None:
        layers = [
            replace(
                layer,
                name=f"{cluster}.{layer.name}",
                axes={f"{cluster}.{key}": axis for key, axis in layer.axes.items()},
                mixer=f"{cluster}.{layer.mixer}",
            )
            for cluster in range(CLUSTERS)
            for layer in model.layers.values()
        ]
        bodies = Bodies(copy.deepcopy(model.body) for _ in range(CLUSTERS))
        super().__init__(bodies, model.selector, layers, model.example_input)
        self._costs = replace(
            model.costs,
            shared=model.costs.shared * CLUSTERS,
            per_module=_in_all_clusters(model.costs.per_module),
            modules=_in_all_clusters(model.costs.modules),
        )


def _in_all_clusters(by_layer: Mapping[str, Value]) -> dict[str, Value]:
    return {
        f"{cluster}.{name}": value
        for cluster in range(CLUSTERS)
        for name, value in by_layer.items()
    }


class Clusters(Nested):
    """The widest prefix of every cluster's model that a device's budget allows."""

    def __init__(self, model: ModularModel, **options: Any) -> None:
        super().__init__(ClusteredModel(model), **options)
        self._costs = model.costs  # of one cluster's model

    def derive(self, profile: DeviceProfile, server_round: int) -> Selection:
        """Choose the same prefix of each model."""
        prefix = window(self._costs, numbers_within(self._costs, profile.budget))
        return _in_all_clusters(prefix)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge each model from the devices that chose it."""
        return super().aggregate_train(server_round, (self._completed(reply) for reply in replies))

    def _completed(self, reply: Message) -> Message:
        """Add to a reply the models that its device did not train, as it got them."""
        device_at = {node: device for device, node in self.roster.node_ids.items()}
        device = device_at.get(reply.metadata.src_node_id)
        if reply.has_content() and device in self.selections:
            metrics = next(iter(reply.content.metric_records.values()), MetricRecord())
            for record in reply.content.array_records.values():
                sent, _ = self.cloud.pack(self.selections[device])
                for key in record.keys() & sent.keys():
                    record[key] = with_block(sent[key], record[key], metrics.get(_CHOSEN))
        return reply

    def merge(self, updates: Iterable[Update]) -> dict[str, Tensor]:
        """Merge cluster by cluster; a model nobody chose stays as it is."""
        updates = list(updates)
        result = dict(self.state)
        layers = self.model.layers.values()
        for cluster in range(CLUSTERS):
            own = [u for u in updates if self.reply_metrics[u.device].get(_CHOSEN) == cluster]
            merged = merge(self.state, own, layers, weighting="examples")
            result.update({k: t for k, t in merged.items() if k.startswith(f"{cluster}.")})
        return result


def with_block(whole: Array, block: Array, cluster: object) -> Array:
    """Return a part of all models with one model's replaced; a block that doesn't fit, as it is.

    The tensors of a part lie end to end, model by model, and all models are alike.
    """
    values = whole.numpy().copy()
    size = len(values) // CLUSTERS
    if cluster not in range(CLUSTERS) or list(block.shape) != [size]:
        return block  # to be refused
    start = int(cluster) * size  # type: ignore[call-overload]
    values[start : start + size] = block.numpy()
    return Array(values)


def _receive(msg: Message, model: ModularModel) -> nn.Module:
    return receive(msg, ClusteredModel(model))


def _modules(msg: Message, model: ModularModel) -> Selection:
    held = selection_of(msg)
    return {name: held[f"0.{name}"] for name in model.layers}


@torch.no_grad()
def _select(model: Bodies, data: TensorDataset, generator: torch.Generator) -> None:
    x, y = data.tensors
    losses = []
    with evaluating(model):
        for body in model:
            losses.append(F.cross_entropy(body(x), y))
    best = torch.stack(losses)
    equally_good = (best == best.min()).nonzero().flatten()
    model.chosen = int(equally_good[int(torch.randint(len(equally_good), (), generator=generator))])


def _reply(msg: Message, model: Bodies | None = None, **answer: Any) -> Message:
    """Return the model in use and say which it is."""
    if model is None:
        return reply(msg, **answer)
    metrics = {**(answer.pop("metrics", None) or {}), _CHOSEN: model.chosen}
    whole = reply(msg, model, metrics=metrics, **answer)
    for record in whole.content.array_records.values():
        for key, array in record.items():
            record[key] = Array(np.split(array.numpy(), CLUSTERS)[model.chosen])
    return whole


METHOD = Method(
    name="clusters",
    strategy=Clusters,
    offline="nested",
    arrays=lambda model: ArrayRecord(ClusteredModel(model).state_dict()),
    body=lambda arrays: None,
    receive=_receive,
    select=_select,
    modules=_modules,
    reply=_reply,
    cached=False,
)
