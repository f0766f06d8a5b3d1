"""Asking devices for their profiles: at most a few questions are in memory at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from federated import eclm_app, grid_of
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import nn

from eclm_flower import modularize
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.exchange import Deadline
from eclm_flower.federation.profiles import ask

NODES = 300


def test_questions_are_made_when_they_are_sent():
    grid = grid_of(eclm_app(), NODES)
    made, pushed, waiting = [], [], []
    push = grid.push_messages

    def push_messages(messages):
        messages = list(messages)
        pushed.extend(messages)
        waiting.append(len(made) - len(pushed))
        return push(messages)

    def question(node_id: int) -> RecordDict:
        made.append(node_id)
        return RecordDict({"config": ConfigRecord()})

    grid.push_messages = push_messages
    nodes = sorted(grid.get_node_ids())
    profiles, losses = ask(grid, nodes, question, until=Deadline.after(60))
    assert made == nodes
    assert not losses
    assert [(node, told.device) for node, told in profiles.items()] == [
        (1000 + device, device) for device in range(NODES)
    ]
    assert len(waiting) > 3
    assert set(waiting) == {0}


@pytest.mark.parametrize("silent", [{3}, {0, 1, 2, 3}])
def test_nodes_that_do_not_answer_are_counted_silent(silent):
    grid = grid_of(eclm_app(), 4)
    pull = grid.pull_messages

    def pull_messages(message_ids):
        return [
            reply for reply in pull(message_ids) if reply.metadata.src_node_id - 1000 not in silent
        ]

    grid.pull_messages = pull_messages
    nodes = sorted(grid.get_node_ids())
    question = RecordDict({"config": ConfigRecord()})
    profiles, losses = ask(grid, nodes, lambda _: question, until=Deadline.after(0.2))
    assert {told.device for told in profiles.values()} == {0, 1, 2, 3} - silent
    assert losses == {"silent": len(silent)}


def test_the_cloud_knows_importance_that_all_data_has_alike():
    torch.manual_seed(0)
    body = nn.Sequential(
        *(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()),
        *(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)),
    )
    model = modularize(
        body,
        modules_per_layer=4,
        example_input=torch.zeros(1, 12),
        selector_share=0.5,
        sub_tasks=3,
    )
    assert len(model.selector.sizes) == 3  # two layers, and delta modules
    nn.init.normal_(model.selector.heads.bias)

    def known():
        return CloudModel.opened(model, ArrayRecord(model.state_dict()), 0).everyones_importance

    told = model.importance([torch.randn(5, 12)])
    assert known().keys() == told.keys()
    for layer, values in known().items():
        assert values.dtype == told[layer].dtype
        np.testing.assert_allclose(values, told[layer], rtol=1e-6)
    with torch.no_grad():
        model.selector.heads.weight[-1, 0] = 0.1  # of one sub-task: devices differ
    assert known() is None
