"""What holds for every method, whatever it does."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord
from unequal_federation import (
    DEVICES,
    Settings,
    app_for,
    budget_of,
    build_model,
    grid_of,
    local_data,
    run,
)

from eclm_flower.federation import content_bytes
from eclm_flower.federation.messages import SELECTOR
from eclm_flower.modular.selection import checked
from strategies import METHODS, clusters

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")
FEDERATED = [name for name, method in METHODS.items() if method.federated]
WITHIN_BUDGETS = [
    name for name in METHODS if name not in ("fedavg", "no-adaptation", "local-adaptation")
]
BY_IMPORTANCE = [n for n in METHODS if n.startswith("eclm") and n != "eclm-no-importance"]


def arrays_of(record):
    """The values of each array, in whatever order its numbers lie in memory."""
    return {key: array.numpy().tobytes() for key, array in record.items()}


@pytest.mark.parametrize("name", METHODS)
def test_two_rounds_run_and_every_device_answers(name):
    method = METHODS[name]
    _, result = run(method)
    assert len(result.evaluate_metrics_clientapp) == 2
    if method.federated:
        before = arrays_of(method.arrays(build_model()))
        assert arrays_of(result.arrays).keys() == before.keys()
        assert arrays_of(result.arrays) != before
        assert set(result.train_metrics_clientapp) == {1, 2}


@pytest.mark.parametrize("name", FEDERATED)
def test_the_same_seed_gives_the_same_numbers_whatever_the_order_of_replies(name):
    method = METHODS[name]
    _, first = run(method, fraction_train=0.6, seed=1)

    model = build_model()
    strategy = method.strategy(model, seed=1, fraction_train=0.6)
    grid, arrays = grid_of(app_for(method)), method.arrays(model)
    for server_round in (1, 2):
        messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
        replies = list(grid.send_and_receive(list(messages)))
        assert len(replies) == 3
        arrays, _ = strategy.aggregate_train(server_round, replies[::-1])
    assert arrays_of(arrays) == arrays_of(first.arrays)


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_ask_the_same_devices(name):
    def asked(method):
        strategy = method.strategy(build_model(), seed=5, fraction_train=0.4)
        grid, arrays = grid_of(app_for(method)), method.arrays(build_model())
        messages = strategy.configure_train(3, arrays, ConfigRecord(), grid)
        return [message.metadata.dst_node_id for message in messages]

    assert asked(METHODS[name]) == asked(METHODS["fedavg"])


@pytest.mark.parametrize("name", WITHIN_BUDGETS)
def test_what_a_device_trains_and_what_is_sent_to_it_fit_its_budget(name):
    method, model, sent = METHODS[name], build_model(), []
    run(method, app=app_for(method, seen=sent), rounds=1)
    requests = [message for message in sent if message.metadata.message_type != "query"]
    assert len(requests) == (1 + method.federated) * DEVICES
    for message in requests:
        device = message.metadata.dst_node_id - 1000
        budget, used = budget_of(model, device), method.modules(message, model)
        costs = method.strategy(model).costs if method.feedback else model.costs
        assert budget.allows(costs.of(checked(used, costs.modules))), (device, used)
        transfers = clusters.CLUSTERS if name == "clusters" else 1
        assert content_bytes(message.content) <= transfers * budget.communication_bytes


@pytest.mark.parametrize("name", METHODS)
def test_only_methods_that_use_importance_pay_for_the_selector(name):
    method, sent = METHODS[name], []
    run(method, app=app_for(method, seen=sent), rounds=1)
    keys = {
        key
        for message in sent
        for arrays in message.content.array_records.values()
        for key in arrays
    }
    assert any(key.startswith(SELECTOR) for key in keys) is (name in BY_IMPORTANCE)


@pytest.mark.parametrize("name", FEDERATED)
def test_the_bytes_counted_are_those_of_the_records_that_travelled(name):
    method, sent, model = METHODS[name], [], build_model()
    strategy = method.strategy(model)
    grid = grid_of(app_for(method, seen=sent))
    messages = strategy.configure_train(1, method.arrays(model), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(list(messages)))
    up = sum(content_bytes(reply.content) for reply in replies)
    strategy.aggregate_train(1, replies)
    down = sum(content_bytes(m.content) for m in sent if m.metadata.message_type == "train")
    counted = grid.traffic["train"].values()
    assert sum(traffic.down for traffic in counted) == down
    assert sum(traffic.up for traffic in counted) == up


@pytest.mark.parametrize("name", [name for name in FEDERATED if name in WITHIN_BUDGETS])
def test_what_no_device_of_the_round_held_stays_bit_for_bit(name):
    method, model = METHODS[name], build_model()
    strategy = method.strategy(model, fraction_train=0.4, seed=3)
    arrays = method.arrays(model)
    grid = grid_of(app_for(method))
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    selections = list(strategy.selections.values())
    assert len(selections) == 2
    merged, _ = strategy.aggregate_train(1, list(grid.send_and_receive(messages)))
    moved = []
    for layer in strategy.model.layers.values():
        held = set().union(*(selection[layer.name] for selection in selections))
        assert len(held) < layer.modules, "a test in which devices hold everything shows nothing"
        for key in layer.axes:
            before, after = (
                layer.packed(key, torch.from_numpy(record[f"body.{key}"].numpy()))
                for record in (arrays, merged)
            )
            differs = {m for m in range(layer.modules) if not torch.equal(before[m], after[m])}
            assert differs <= held
            moved.append(bool(differs))
    assert any(moved)


@pytest.mark.parametrize("name", METHODS)
def test_adapting_on_the_device_lowers_the_loss(name):
    method, losses = METHODS[name], []

    def opened(device, own):
        first, last = (
            method.adapt(own, local_data(device), settings, torch.Generator().manual_seed(0))
            for settings in (Settings(learning_rate=1e-9), Settings(local_epochs=8))
        )
        losses.append((first, last))

    run(method, rounds=1, app=app_for(method, opened=opened))
    assert losses
    assert all(last < first for first, last in losses)


@pytest.mark.parametrize("name", METHODS)
def test_the_whole_cloud_model_can_be_measured(name):
    method, model = METHODS[name], build_model()
    state = method.body(method.arrays(model))
    if name == "clusters":
        assert state is None
    else:
        assert state.keys() == model.body.state_dict().keys()
        assert all(torch.equal(t, model.body.state_dict()[key]) for key, t in state.items())
