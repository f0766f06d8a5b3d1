import logging

import numpy as np
import pytest
import torch
from federated import build_model, eclm_app, fedavg_app, grid_of, local_data
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg

from eclm_flower import ECLM, Budget, modularize
from eclm_flower.errors import RequestError
from eclm_flower.federation import Roster
from eclm_flower.federation.messages import selection_from_config
from eclm_flower.federation.profiles import TTL_MARGIN
from eclm_flower.federation.wire import by_part, forms, unflattened
from eclm_flower.modular import split_between
from eclm_flower.modular.families import register
from eclm_flower.modular.selection import count


def run(model, app, *, nodes=4, rounds=2, strategy=None, **options):
    strategy = strategy or ECLM(model, **options)
    result = strategy.start(
        grid_of(app, nodes), ArrayRecord(model.state_dict()), num_rounds=rounds, timeout=5
    )
    return strategy, result


def half(model, device):
    return Budget.share_of(model.costs, communication_bytes=0.5)


def test_a_whole_federation_trains_and_evaluates():
    _, result = run(build_model(), eclm_app(budget=half), rounds=5)
    accuracy = [metrics["accuracy"] for metrics in result.evaluate_metrics_clientapp.values()]
    assert len(accuracy) == 5
    assert accuracy[-1] > accuracy[0]
    assert result.train_metrics_clientapp[5]["eclm-merged"] == 4
    assert result.train_metrics_clientapp[5]["loss"] < result.train_metrics_clientapp[1]["loss"]


def test_a_device_is_sent_only_the_arrays_of_its_modules():
    seen = []
    model = build_model()
    run(model, eclm_app(budget=half, seen=seen), rounds=1)
    assert len(seen) == 4
    for message in seen:
        selection = selection_from_config(message.content["config"])
        assert 1 <= count(selection) < 4
        expected = model.sub_model(selection).state_dict()
        parts = by_part(forms(expected), model.layers.values())
        sent = unflattened(message.content["arrays"], parts)
        got = {key: tensor for part in sent.values() for key, tensor in part.items()}
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


def test_devices_of_unequal_budgets_get_unequal_sub_models():
    def budget(model, device):
        return Budget.share_of(model.costs, memory_bytes=(device + 1) / 4)

    strategy, _ = run(build_model(), eclm_app(budget=budget), rounds=1)
    assert [count(strategy.selections[device]) for device in range(4)] == [1, 2, 3, 4]


def test_full_budgets_and_one_module_a_layer_give_the_numbers_of_flowers_fedavg():
    model = build_model(1)
    app = eclm_app(modules=1)
    _, ours = run(model, app, rounds=3, fraction_evaluate=0.0)
    theirs = FedAvg(fraction_evaluate=0.0).start(
        grid_of(fedavg_app()), ArrayRecord(model.body.state_dict()), num_rounds=3
    )
    for key, array in theirs.arrays.items():
        np.testing.assert_allclose(
            ours.arrays[f"body.{key}"].numpy(), array.numpy(), rtol=1e-5, atol=1e-6
        )
    assert ours.train_metrics_clientapp[3]["loss"] == pytest.approx(
        theirs.train_metrics_clientapp[3]["loss"], rel=1e-5
    )


def test_runs_repeat_bit_for_bit_although_nodes_come_in_any_order():
    def arrays(reverse):
        grid = grid_of(eclm_app(budget=half), 6)
        names = list(grid._contexts.items())
        if reverse:  # other node ids for the same devices, as in every Flower run
            partitions = [context for _, context in names][::-1]
            grid._contexts = {1_000_000 - i: context for i, context in enumerate(partitions)}
        model = build_model()
        strategy = ECLM(model, fraction_train=0.5, seed=3)
        return strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=3).arrays

    first, second = arrays(False), arrays(True)
    assert all(first[key].data == second[key].data for key in first)


def test_another_seed_draws_other_devices():
    def drawn(seed):
        seen = []
        run(
            build_model(),
            eclm_app(seen=seen),
            nodes=8,
            rounds=3,
            seed=seed,
            fraction_train=0.25,
            fraction_evaluate=0.0,
        )
        return [message.metadata.dst_node_id for message in seen]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_modules_nobody_returned_stay_bit_for_bit():
    def smallest(model, device):
        return Budget.share_of(model.costs, memory_bytes=0.25)

    model = build_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    strategy, result = run(model, eclm_app(budget=smallest), rounds=1)
    layer = model.layers["0"]
    touched = {m for selection in strategy.selections.values() for m in selection["0"]}
    assert 0 < len(touched) < 4
    for key in layer.axes:
        old = layer.packed(key, before[f"body.{key}"])
        new = layer.packed(key, torch.from_numpy(result.arrays[f"body.{key}"].numpy()))
        for module in range(4):
            same = torch.equal(old[module], new[module])
            assert same == (module not in touched), (key, module)


def test_the_selector_is_sent_once_to_a_device_and_never_merged():
    asked = []
    model = build_model()
    app = eclm_app()
    query = app._registered_funcs["query.default"]

    def spy(message, context):
        asked.append((context.node_id, bool(message.content.array_records)))
        return query(message, context)

    app._registered_funcs["query.default"] = spy
    _, result = run(model, app, rounds=3)
    assert sum(wanted for _, wanted in asked) == 4  # importance, once each
    assert len(asked) == 4 * (1 + 3)  # who are you, then the budget in every round
    for key, value in model.selector.state_dict().items():
        np.testing.assert_array_equal(result.arrays[f"selector.{key}"].numpy(), value)


def spied_app():
    """An app, and a list that says of every query whether it asked for importance."""
    asked, app = [], eclm_app()
    query = app._registered_funcs["query.default"]

    def spy(message, context):
        asked.append(bool(message.content.array_records))
        return query(message, context)

    app._registered_funcs["query.default"] = spy
    return app, asked


def test_importance_is_asked_again_when_it_gets_old():
    app, asked = spied_app()
    run(build_model(), app, rounds=4, importance_every=2)
    assert sum(asked) == 4 * 2


def test_importance_of_an_earlier_start_gets_old_too():
    app, asked = spied_app()
    strategy = ECLM(build_model(), importance_every=2)
    run(strategy.model, app, strategy=strategy, rounds=2)
    asked.clear()
    run(strategy.model, app, strategy=strategy, rounds=3)
    assert sum(asked) == 4  # in round 2: its rounds count from 1 again


def test_nobody_is_asked_for_importance_that_is_alike_for_all_data():
    app, asked = spied_app()
    model = build_model()
    model.selector.prefer_in_order("0", by=0.5)
    assert model.selector.heads.weight.eq(0).all()
    strategy, _ = run(model, app, rounds=3, importance_every=1)
    assert len(asked) == 4 * (1 + 3)
    assert not any(asked)
    assert len(strategy.profiles) == 4
    for device, profile in strategy.profiles.items():
        expected = model.importance([local_data(device)[0]])
        assert profile.importance.keys() == expected.keys()
        np.testing.assert_allclose(profile.importance["0"], expected["0"], rtol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_a_budget_that_is_fresh_is_not_asked_again(fails):
    asked = []
    app = eclm_app()
    query = app._registered_funcs["query.default"]

    def spy(message, context):
        asked.append(context.node_id)
        if fails and asked.count(context.node_id) == 3 and context.node_id == min(asked):
            raise RuntimeError("busy")
        return query(message, context)

    app._registered_funcs["query.default"] = spy
    _, result = run(build_model(), app, rounds=4, budget_every=2)
    # Who are you, then the budget in rounds 1 and 3; who failed in 3 is left out, and asked in 4.
    assert len(asked) == 4 * (1 + 2) + fails
    merged = [metrics["eclm-merged"] for metrics in result.train_metrics_clientapp.values()]
    assert merged == [4, 4, 4 - fails, 4]


def test_a_budget_that_fits_nothing_leaves_the_device_out(caplog):
    def budget(model, device):
        return Budget(memory_bytes=10) if device == 2 else Budget()

    flower_log = logging.getLogger("flwr")
    flower_log.addHandler(caplog.handler)
    try:
        _, result = run(build_model(), eclm_app(budget=budget), rounds=1)
    finally:
        flower_log.removeHandler(caplog.handler)
    assert result.train_metrics_clientapp[1]["eclm-merged"] == 3
    assert "Device 2 is left out" in caplog.text
    assert "memory_bytes are missing" in caplog.text


def raised(device, answer):
    raise RuntimeError("the disk is full")


def test_a_round_in_which_every_device_fails_changes_nothing():
    model = build_model()
    _, result = run(model, eclm_app(spoil=raised), rounds=2)
    assert result.train_metrics_clientapp[2]["eclm-failed"] == 4
    assert not result.arrays  # Flower keeps the initial arrays when nothing was aggregated


def test_replies_are_matched_by_key_and_never_by_order():
    def shuffled(device, answer):
        if answer.content.array_records:
            answer.content["arrays"] = ArrayRecord(dict(reversed(answer.content["arrays"].items())))
        return answer

    _, plain = run(build_model(), eclm_app(budget=half), rounds=1)
    _, mixed = run(build_model(), eclm_app(budget=half, spoil=shuffled), rounds=1)
    assert all(plain.arrays[key].data == mixed.arrays[key].data for key in plain.arrays)


def test_a_reply_is_merged_once_and_strangers_are_ignored():
    model = build_model()
    strategy = ECLM(model)
    grid = grid_of(eclm_app())
    arrays = ArrayRecord(model.state_dict())
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    once, metrics = strategy.aggregate_train(1, replies)
    twice, _ = strategy.aggregate_train(1, replies + replies[::-1])
    assert metrics["eclm-merged"] == 4
    assert all(once[key].data == twice[key].data for key in once)

    again = list(strategy.configure_train(2, arrays, ConfigRecord(), grid))
    grid.push_messages(again)
    late, metrics = strategy.aggregate_train(2, replies)  # of the round before
    assert late is None
    assert (metrics["eclm-merged"], metrics["eclm-silent"]) == (0, 4)


def test_every_device_has_a_record_of_its_own():
    model = build_model()
    strategy = ECLM(model)
    config = ConfigRecord({"lr": 0.1})
    grid = grid_of(eclm_app(budget=half))
    messages = list(strategy.configure_train(1, ArrayRecord(model.state_dict()), config, grid))
    contents = [message.content for message in messages]
    assert len({id(content) for content in contents}) == len(contents)
    assert len({id(content["config"]) for content in contents}) == len(contents)
    assert all(content["config"]["lr"] == 0.1 for content in contents)
    assert not selection_from_config(config)  # the user's record is not written to
    shared = {id(content["arrays"]["shared.float32"]) for content in contents}
    assert len(shared) == 1  # the shared part is serialised once for all


def test_users_record_keys_and_configs_are_kept():
    seen = []
    model = build_model()
    strategy = ECLM(model, arrayrecord_key="weights", configrecord_key="setup")
    strategy.start(
        grid_of(eclm_app(seen=seen)),
        ArrayRecord(model.state_dict()),
        num_rounds=1,
        train_config=ConfigRecord({"lr": 0.5}),
    )
    assert seen[0].content["setup"]["lr"] == 0.5
    assert seen[0].content["setup"]["server-round"] == 1
    assert "weights" in seen[0].content


def test_gates_of_the_selector_travel_with_the_sub_model_when_the_model_uses_them():
    seen = []
    model = build_model(gating="selector", top_k=2)
    app = eclm_app(budget=half, seen=seen, gating="selector", top_k=2)
    _, result = run(model, app, rounds=2)
    assert any(key.startswith("selector.") for key in seen[0].content["arrays"])
    assert result.train_metrics_clientapp[2]["eclm-merged"] == 4


def test_arrays_of_another_model_are_refused_before_anything_is_sent():
    model = build_model()
    with pytest.raises(RequestError, match=r"ArrayRecord\(model.state_dict\(\)\)"):
        ECLM(model).start(grid_of(eclm_app()), ArrayRecord(model.body.state_dict()), num_rounds=1)


def test_too_few_nodes_end_the_wait_with_a_sentence():
    model = build_model()
    with pytest.raises(TimeoutError, match="Expected at least 9 nodes, but only 4"):
        ECLM(model, min_available_nodes=9).start(
            grid_of(eclm_app()), ArrayRecord(model.state_dict()), num_rounds=1, timeout=0.2
        )


def test_devices_known_by_a_large_node_id_can_be_drawn():
    roster = Roster(seed=0)
    roster.node_ids = {2**63 + 5 * number: number for number in range(9)}
    drawn = roster.draw(4, server_round=1, purpose=0)
    assert len(drawn) == 4
    assert drawn == sorted(set(drawn) & roster.node_ids.keys())


def answers_late(asked, times):
    """An app whose device 0 fails to say who it is so many times; `asked` collects when."""
    app = eclm_app()
    query = app._registered_funcs["query.default"]

    def late(message, context):
        if context.node_config["partition-id"] == 0 and len(asked) < times:
            asked.append(message)
            raise RuntimeError("no answer")
        return query(message, context)

    app._registered_funcs["query.default"] = late
    return app


def test_a_node_that_never_answers_is_asked_ever_more_rarely():
    asked = []
    _, result = run(build_model(), answers_late(asked, times=99), rounds=8)
    assert len(asked) == 5  # greetings 1, 2, 4, 8, 16 of two a round
    assert result.train_metrics_clientapp[8]["eclm-merged"] == 3


def test_a_node_that_misses_its_greeting_joins_soon():
    _, result = run(build_model(), answers_late([], times=1), rounds=2)
    assert [result.train_metrics_clientapp[r]["eclm-asked"] for r in (1, 2)] == [3, 4]


def test_every_node_is_asked_while_too_few_are_known():
    asked = []
    app = answers_late(asked, times=99)
    run(build_model(), app, rounds=4, min_available_nodes=4)
    assert len(asked) == 8


def test_messages_do_not_outlive_the_round():
    seen = []
    run(build_model(), eclm_app(seen=seen))
    assert all(4 < message.metadata.ttl < 5 + 2 * TTL_MARGIN for message in seen)


def test_buffers_that_are_not_floating_point_stay_where_they_are():
    class Masked(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
            self.register_buffer("mask", torch.ones(4, dtype=torch.bool))

    register(Masked)(lambda block: [split_between(block, into=["0"], out_of="2")])
    model = modularize(
        Masked(), modules_per_layer=4, example_input=torch.zeros(1, 12), selector_share=1
    )
    strategy = ECLM(model)
    strategy.take_over(ArrayRecord(model.state_dict()), 1)
    assert "body.mask" in strategy.cloud.arrays
    arrays, _ = strategy.cloud.pack({"0": (0, 1)})
    assert set(arrays) == {"shared.float32", "modules.float32"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"derive_on": "edge"}, "derive_on from cloud, device, got 'edge'"),
        ({"weighting": "fair"}, "weighting from importance-examples, .*, got 'fair'"),
        ({"batch_norm": "froze"}, "batch_norm from frozen, merged, got 'froze'"),
    ],
)
def test_an_unknown_choice_is_refused_before_anything_is_sent(options, said):
    with pytest.raises(ValueError, match=said):
        ECLM(build_model(), **options)


def test_a_bad_interval_is_refused():
    with pytest.raises(ValueError, match="importance_every >= 1"):
        ECLM(build_model(), importance_every=0)
    with pytest.raises(ValueError, match="budget_every >= 1"):
        ECLM(build_model(), budget_every=0)


def test_derive_can_be_overridden_and_knows_the_round():
    class Rolling(ECLM):
        def derive(self, profile, server_round):
            return {"0": (server_round % 4,)}

    strategy, _ = run(build_model(), eclm_app(), strategy=Rolling(build_model()), rounds=3)
    assert all(selection == {"0": (3,)} for selection in strategy.selections.values())


def test_merge_can_be_overridden_and_sees_the_cloud_model_and_the_replies_metrics():
    class OnlyTheHead(ECLM):
        def merge(self, updates):
            updates = list(updates)
            seen.update(self.reply_metrics)
            mean = sum(update.state["4.bias"] for update in updates) / len(updates)
            return {**self.state, "4.bias": mean}

    seen = {}
    model = build_model()
    before = ArrayRecord(model.state_dict())
    _, result = run(model, eclm_app(budget=half), strategy=OnlyTheHead(model), rounds=1)
    changed = {key for key in before if result.arrays[key].data != before[key].data}
    assert changed == {"body.4.bias"}
    assert [seen[device]["num-examples"] for device in range(4)] == [20, 24, 28, 32]


def test_a_strategy_that_needs_no_importance_is_never_charged_the_selector():
    class Prefix(ECLM):
        uses_importance = False

        def derive(self, profile, server_round):
            return {"0": (0, 1)}

    app, asked = spied_app()
    strategy, result = run(build_model(), app, strategy=Prefix(build_model()), rounds=2)
    assert asked
    assert not any(asked)
    assert all(not profile.importance for profile in strategy.profiles.values())
    assert result.train_metrics_clientapp[2]["eclm-merged"] == 4
