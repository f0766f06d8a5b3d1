import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset
from unequal_federation import CLASSES, Settings, app_for, build_model, local_data, received, run

from eclm_flower import modularize
from eclm_flower.adaptation import Update
from eclm_flower.federation.client import selection_of
from eclm_flower.federation.wire import by_part, forms, unflattened
from eclm_flower.modular import slim_resnet
from strategies.heterofl import METHOD, head_keys, masked_cross_entropy, merge_rows
from strategies.scaler import scale_hidden_units

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


def test_devices_get_the_widest_prefix_that_halves_the_model():
    strategy, _ = run(METHOD, rounds=1)
    numbers = [len(strategy.selections[device]["0"]) for device in range(5)]
    assert numbers == [1, 2, 2, 4, 8]
    for selection in strategy.selections.values():
        assert all(modules == tuple(range(len(modules))) for modules in selection.values())
        assert len({len(modules) for modules in selection.values()}) == 1


def test_hidden_units_are_divided_by_the_share_held():
    model = build_model()
    x = torch.randn(6, 12)
    plain = model.sub_model(dict.fromkeys(model.layers, (0, 1))).eval()
    scaled = model.sub_model(dict.fromkeys(model.layers, (0, 1))).eval()
    scale_hidden_units(scaled, model.layers.values())
    with torch.no_grad():
        hidden = plain[:3](x)
        expected = plain[3](4 * hidden)  # two modules of eight
        torch.testing.assert_close(scaled[:4](x), expected)
        hidden = plain[5:7](F.relu(expected))
        torch.testing.assert_close(scaled(x), plain[8:](plain[7](4 * hidden)))


def test_the_whole_model_is_not_scaled_and_handles_undo_it():
    model, x = build_model(), torch.randn(3, 12)
    model.eval()
    before = model(x)
    handles = scale_hidden_units(model.body, model.layers.values())
    assert torch.equal(model(x), before)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks for module in model.body.modules())


def test_the_scaler_knows_the_channels_of_images():
    example = torch.randn(1, 3, 16, 16)
    model = modularize(slim_resnet(), modules_per_layer=4, example_input=example)
    half = dict.fromkeys(model.layers, (0, 1))
    scaled, plain = model.sub_model(half), model.sub_model(half)
    scale_hidden_units(scaled, model.layers.values())
    for block in plain.blocks:
        block.conv2.weight.data *= 2  # what scaling the hidden channels by two comes to
    torch.testing.assert_close(scaled(example), plain(example))


def test_static_batch_norm_trains_on_the_batch_and_keeps_no_statistics():
    module = received(METHOD)[4]
    norm = next(part for part in module.modules() if isinstance(part, nn.BatchNorm1d))
    before = norm.running_mean.clone()
    x, _ = local_data(4).tensors
    module.train()
    seen = []
    norm.register_forward_hook(lambda _, inputs, output: seen.append(output))
    module(x)
    assert torch.equal(norm.running_mean, before)
    assert seen[0].detach().mean(dim=0).sub(norm.bias).abs().max() < 1e-5  # the batch's own mean
    module.eval()
    module(x[:1])
    expected = F.batch_norm(
        module[0](x[:1]), norm.running_mean, norm.running_var, norm.weight, norm.bias
    )
    torch.testing.assert_close(seen[1], expected)


def test_statistics_of_the_trained_model_are_collected_and_merged():
    class Still:
        learning_rate, batch_size, local_epochs = 1e-12, 1000, 1

    _, result = run(METHOD, rounds=1, app=app_for(METHOD, settings=Still()))
    model = build_model()
    means = []
    for device in range(5):
        x, _ = local_data(device).tensors
        means.append(model.body[0](x).mean(dim=0).detach())
    # Module 7 of the first layer is held by device 4 alone, module 0 by all.
    got = torch.from_numpy(result.arrays["body.1.running_mean"].numpy())
    torch.testing.assert_close(got[14:], means[4][14:], rtol=1e-4, atol=1e-5)
    weights = np.array([20 + 4 * device for device in range(5)])
    expected = np.average([mean[:2].numpy() for mean in means], axis=0, weights=weights)
    np.testing.assert_allclose(got[:2], expected, rtol=1e-4, atol=1e-5)


def test_a_single_sample_at_the_end_joins_the_batch_before_it():
    x, y = local_data(4).tensors  # 36
    settings = Settings(batch_size=5)
    module = received(METHOD)[4]
    counted = []
    module[1].register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[0])))
    METHOD.adapt(module, TensorDataset(x, y), settings, torch.Generator().manual_seed(0))
    assert counted == 2 * [5, 5, 5, 5, 5, 5, 6]  # training, and then the statistics


def test_masked_cross_entropy_gives_no_gradient_to_absent_classes():
    logits = torch.randn(7, 5, requires_grad=True)
    y = torch.tensor([1, 3, 3, 1, 1, 3, 1])
    loss = masked_cross_entropy(logits, y, present=y.unique())
    loss.backward()
    assert (logits.grad[:, [0, 2, 4]] == 0).all()
    assert (logits.grad[:, [1, 3]] != 0).all()
    zeroed = logits.detach().clone()
    zeroed[:, [0, 2, 4]] = 0
    torch.testing.assert_close(loss.detach(), F.cross_entropy(zeroed, y))


def test_a_class_keeps_its_head_row_on_devices_without_it_and_is_merged_from_the_others():
    replies, model = {}, build_model()
    app = app_for(METHOD)
    train = app._registered_funcs["train.default"]

    def spy(msg: Message, context) -> Message:
        answer = train(msg, context)
        state = model.sub_model(selection_of(msg)).state_dict()
        parts = unflattened(answer.content["arrays"], by_part(forms(state), model.layers.values()))
        replies[context.node_config["partition-id"]] = parts["shared"]["9.weight"]
        return answer

    app._registered_funcs["train.default"] = spy
    _, result = run(METHOD, rounds=1, app=app)
    before = build_model().body[9].weight.detach().numpy()
    has, rows, examples = [], [], []
    for device, after in sorted(replies.items()):
        labels = local_data(device).tensors[1]
        has.append(np.isin(np.arange(CLASSES), labels))
        np.testing.assert_array_equal((after.numpy() != before).any(axis=1), has[-1])
        rows.append(after.numpy())
        examples.append(len(labels))
    assert 0 < np.mean(has) < 1
    weights = np.array(has) * np.array(examples)[:, None]
    expected = (weights[:, :, None] * rows).sum(axis=0) / weights.sum(axis=0)[:, None]
    got = result.arrays["body.9.weight"].numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_head_is_the_last_linear_layer_of_the_shared_part():
    assert head_keys(build_model()) == ["9.bias", "9.weight"]


def update(device, rows, examples):
    return Update(
        device=device,
        selection={},
        state={"head": torch.tensor(rows)},
        importance={},
        num_examples=examples,
    )


def test_rows_are_merged_from_the_devices_that_changed_them():
    before = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    updates = [
        update(0, [[5.0, 1.0], [2.0, 2.0], [3.0, 3.0]], 10),
        update(1, [[1.0, 1.0], [4.0, 0.0], [3.0, 3.0]], 30),
        update(2, [[1.0, 1.0], [0.0, 4.0], [3.0, 3.0]], 10),
    ]
    merged = merge_rows(before, updates, "head")
    torch.testing.assert_close(merged, torch.tensor([[5.0, 1.0], [3.0, 1.0], [3.0, 3.0]]))
    assert torch.equal(merged[2], before[2])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_if_all_devices_have_all_classes_rows_are_the_mean_by_examples(number, classes, seed):
    rng = np.random.default_rng(seed)
    before = torch.from_numpy(rng.normal(size=classes))
    updates = [
        update(device, rng.normal(size=classes).tolist(), float(rng.integers(1, 100)))
        for device in range(number)
    ]
    expected = np.average(
        [u.state["head"].numpy() for u in updates],
        axis=0,
        weights=[u.num_examples for u in updates],
    )
    np.testing.assert_allclose(merge_rows(before, updates, "head"), expected, rtol=1e-5, atol=1e-6)
