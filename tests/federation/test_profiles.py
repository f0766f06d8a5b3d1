"""Asking devices for their profiles: at most a few questions are in memory at a time."""

from __future__ import annotations

import pytest
from federated import eclm_app, grid_of
from flwr.app import ConfigRecord, RecordDict

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
