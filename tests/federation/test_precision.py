"""Sending less: half precision, and what changed as 8-bit integers with error feedback."""

import numpy as np
import pytest
import torch
from federated import build_model, eclm_app, grid_of, local_data, train_locally
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from eclm_flower import ECLM, Budget, profile, receive, reply
from eclm_flower.errors import RequestError
from eclm_flower.federation import content_bytes
from eclm_flower.federation.cache import ModuleCache
from eclm_flower.federation.differences import ErrorFeedback
from eclm_flower.federation.wire import BLOCK, bytes_per_value, flattened, forms, unflattened

HALVES = [torch.float16, torch.bfloat16]


def half(model, device):
    return Budget.share_of(model.costs, communication_bytes=0.5)


def app_with_feedback(feedback, *, seen=None, answers=None, learning_rate=0.1):
    """The app of a user whose devices keep what their replies lose."""
    app = ClientApp()
    model = build_model()

    @app.query()
    def query(msg, context):
        x, _ = local_data(context.node_config["partition-id"])
        return profile(msg, context, model, [x])

    @app.train()
    def train(msg, context):
        device = context.node_config["partition-id"]
        if seen is not None:
            seen.append(msg)
        sub_model = receive(msg, model, feedback=feedback(device))
        train_locally(sub_model, device, learning_rate)
        answer = reply(msg, sub_model, num_examples=10)
        if answers is not None:
            answers.append(answer)
        return answer

    return app


def run(app, rounds=1, **options):
    model = build_model()
    strategy = ECLM(model, fraction_evaluate=0.0, **options)
    result = strategy.start(grid_of(app), ArrayRecord(model.state_dict()), num_rounds=rounds)
    return strategy, result


def distance(one, other):
    return max(float(np.abs(one[key].numpy() - other[key].numpy()).max()) for key in one)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=3 * BLOCK),
    st.integers(-30, 4),
)
def test_eight_bits_are_wrong_by_half_a_step_at_most(values, exponent):
    tensor = torch.tensor(values) * 2.0**exponent
    arrays = flattened("modules", {"w": tensor}, torch.int8)
    back = unflattened(arrays, {"modules": forms({"w": tensor})}, torch.int8)["modules"]["w"]
    for start in range(0, len(tensor), BLOCK):
        block = tensor[start : start + BLOCK]
        step = float(block.abs().max()) / 127
        error = float((back[start : start + BLOCK] - block).abs().max())
        assert error <= step * 0.5001 + 1e-37


@pytest.mark.parametrize("dtype", HALVES)
def test_devices_get_the_cloud_model_rounded(dtype):
    seen = []
    model = build_model()
    run(app_with_feedback(lambda device: None, seen=seen), download_dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    assert seen[0].content["arrays"].keys() == {f"shared.{name}", f"modules.{name}"}
    got = receive(seen[0], model).state_dict()
    everything = {layer.name: tuple(range(layer.modules)) for layer in model.layers.values()}
    for key, tensor in model.sub_model(everything).state_dict().items():
        assert torch.equal(got[key], tensor.to(dtype).to(tensor.dtype))
        assert not torch.equal(got[key], tensor)


def test_each_way_takes_the_bytes_its_precision_says():
    def sent_and_received(**options):
        seen, answers = [], []
        app = app_with_feedback(lambda device: None, seen=seen, answers=answers)
        run(app, **options)
        return content_bytes(seen[0].content), content_bytes(answers[0].content)

    model = build_model()
    values = sum(t.numel() for t in model.body.state_dict().values() if t.is_floating_point())
    down, up = sent_and_received()
    half_down, half_up = sent_and_received(download_dtype=torch.float16, upload_dtype=torch.float16)
    _, small_up = sent_and_received(upload_dtype=torch.int8)
    assert down - half_down == pytest.approx(2 * values, abs=60)  # names, numbers of digits
    assert up - half_up == pytest.approx(2 * values, abs=60)
    blocks = 2  # a last one of each part, which is not full
    saved = (4 - bytes_per_value(torch.int8)) * values
    assert up - small_up == pytest.approx(saved, abs=60 + 4 * blocks)


@pytest.mark.parametrize("dtype", [*HALVES, torch.int8])
def test_a_cloud_model_that_nobody_changes_stays_bit_for_bit(dtype):
    model = build_model()
    app = app_with_feedback(lambda device: None, learning_rate=0.0)
    _, result = run(app, rounds=2, upload_dtype=dtype, download_dtype=torch.bfloat16)
    before = ArrayRecord(model.state_dict())
    assert all(
        result.arrays[key].numpy().tobytes() == before[key].numpy().tobytes() for key in before
    )


def test_changes_too_small_for_eight_bits_arrive_in_the_end_with_feedback(tmp_path):
    """A constant change next to a large one is lost in every round, or made up for."""

    def drifting(feedback):
        app = ClientApp()
        model = build_model()

        @app.query()
        def query(msg, context):
            return profile(msg, context, model, [torch.zeros(2, 12)])

        @app.train()
        def train(msg, context):
            sub_model = receive(msg, model, feedback=feedback)
            with torch.no_grad():
                sub_model[4].bias[0] += 1.0
                sub_model[4].bias[1] += 0.002  # a step of 8 bits is 1 / 127
            return reply(msg, sub_model, num_examples=1)

        return app

    rounds = 20
    options = {"upload_dtype": torch.int8, "min_train_nodes": 1, "min_available_nodes": 1}

    def end(feedback):
        model = build_model()
        strategy = ECLM(model, fraction_evaluate=0.0, **options)
        result = strategy.start(
            grid_of(drifting(feedback), 1), ArrayRecord(model.state_dict()), num_rounds=rounds
        )
        return float(result.arrays["body.4.bias"].numpy()[1] - model.body[4].bias[1].detach())

    assert end(None) == pytest.approx(0, abs=1e-6)
    assert end(ErrorFeedback(tmp_path)) == pytest.approx(0.002 * rounds, abs=1 / 127)


def test_training_at_low_precision_ends_near_that_at_full(tmp_path):
    _, full = run(app_with_feedback(lambda device: None), rounds=5)
    start = ArrayRecord(build_model().state_dict())
    app = app_with_feedback(lambda device: ErrorFeedback(tmp_path / str(device)))
    _, low = run(app, rounds=5, download_dtype=torch.float16, upload_dtype=torch.int8)
    assert 0 < distance(full.arrays, low.arrays) < 0.1 * distance(full.arrays, start)


def test_a_cache_holds_what_was_sent_rounded(tmp_path):
    seen = []
    app = eclm_app(budget=half, seen=seen, cache=lambda device: ModuleCache(tmp_path / str(device)))
    strategy = ECLM(build_model(), fraction_evaluate=0.0, download_dtype=torch.float16)
    strategy.merge = lambda updates: list(updates) and dict(strategy.state)  # nothing changes
    strategy.start(grid_of(app), ArrayRecord(build_model().state_dict()), num_rounds=2)
    first, second = seen[:4], seen[4:]
    assert all(message.content["arrays"] for message in first)
    assert not any(message.content["arrays"] for message in second)


def test_budgets_in_bytes_pay_for_more_modules():
    full, less = (
        ECLM(build_model()),
        ECLM(build_model(), download_dtype=torch.float16, upload_dtype=torch.int8),
    )
    (layer,) = full.costs.per_module
    assert less.costs.per_module[layer].communication_bytes == pytest.approx(
        full.costs.per_module[layer].communication_bytes / 2
    )
    assert less.costs.per_module[layer].memory_bytes == full.costs.per_module[layer].memory_bytes
    one_way = ECLM(build_model(), upload_dtype=torch.int8)  # a transfer down is as large as ever
    assert one_way.costs == full.costs
    framing = full.costs.framing_bytes
    shared = full.costs.shared.communication_bytes - framing
    assert less.costs.shared.communication_bytes == pytest.approx(framing + shared / 2)


def test_another_model_than_the_received_one_is_refused():
    seen = []
    run(app_with_feedback(lambda device: None, seen=seen), upload_dtype=torch.int8)
    other = build_model().sub_model({"0": (0, 1, 2, 3)})
    with pytest.raises(RequestError, match="the very model that receive returned"):
        reply(seen[0], other, num_examples=1)


def test_a_diverged_reply_leaves_nothing_behind(tmp_path):
    def diverged():
        app = ClientApp()
        model = build_model()

        @app.query()
        def query(msg, context):
            return profile(msg, context, model, [torch.zeros(2, 12)])

        @app.train()
        def train(msg, context):
            sub_model = receive(msg, model, feedback=ErrorFeedback(tmp_path))
            with torch.no_grad():
                sub_model[0].weight[0, 0] = torch.nan
            return reply(msg, sub_model, num_examples=1)

        return app

    _, result = run(diverged(), upload_dtype=torch.int8)
    assert result.train_metrics_clientapp[1]["eclm-refused-not-finite"] == 4
    kept = [ModuleCache(tmp_path).load(name, number) for name in ("", "0") for number in range(4)]
    values = [tensor for piece in kept for tensor in piece.values()]
    assert all(bool(tensor.isfinite().all()) for tensor in values)


@pytest.mark.parametrize("wrong", [{"download_dtype": torch.int8}, {"upload_dtype": torch.float64}])
def test_precisions_that_there_are_not_are_refused(wrong):
    with pytest.raises(ValueError, match=r"Expected (download|upload)_dtype float16, bfloat16"):
        ECLM(build_model(), **wrong)
