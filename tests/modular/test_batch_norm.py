import copy
import io

import pytest
import torch
from torch import nn

from eclm_flower.modular import apply_policy, modularize
from eclm_flower.modular.batch_norm import batch_sizes


@pytest.fixture(name="model")
def _model(small_mlp):
    return small_mlp()


def train_a_step(model, x):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()


def statistics(model):
    return [model[1].running_mean, model[1].running_var, model[1].num_batches_tracked]


@pytest.mark.parametrize("copied", [False, True])
def test_frozen_statistics_stay_and_the_affine_part_learns(model, copied):
    before = copy.deepcopy(model)
    apply_policy(model, "frozen")
    if copied:
        model = copy.deepcopy(model)
    train_a_step(model, torch.randn(16, 6))
    assert all(map(torch.equal, statistics(model), statistics(before)))
    assert not torch.equal(model[1].weight, before[1].weight)
    assert not torch.equal(model[1].bias, before[1].bias)


def test_a_frozen_sample_does_not_see_its_batch_mates(model):
    apply_policy(model, "frozen").train()
    x = torch.randn(8, 6)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))
    torch.testing.assert_close(model(x), copy.deepcopy(model).eval()(x))


def test_freezing_takes_effect_at_once(model, small_mlp):
    frozen = apply_policy(model.train(), "frozen")
    frozen(torch.randn(8, 6))
    assert all(map(torch.equal, statistics(frozen), statistics(small_mlp())))


def test_frozen_reaches_sub_models(model):
    with pytest.warns(UserWarning, match="selector"):
        modular = modularize(
            apply_policy(model, "frozen"), modules_per_layer=4, example_input=torch.zeros(1, 6)
        )
    sub_model = modular.sub_model({"0": [0, 1], "1": [2]})
    before = [tensor.clone() for tensor in statistics(sub_model)]
    train_a_step(sub_model, torch.randn(16, 6))
    assert all(map(torch.equal, statistics(sub_model), before))


def test_merged_statistics_follow_the_data(model):
    before = copy.deepcopy(model)
    assert apply_policy(model, "merged") is model
    train_a_step(model, torch.randn(16, 6))
    assert not any(map(torch.equal, statistics(model), statistics(before)))


def test_frozen_state_can_be_saved_and_loaded(model, small_mlp):
    frozen = apply_policy(copy.deepcopy(model), "frozen")
    assert isinstance(frozen[1], nn.BatchNorm1d)
    assert list(frozen.state_dict()) == list(model.state_dict())
    other = apply_policy(nn.Sequential(*copy.deepcopy(list(small_mlp()))), "frozen")
    with torch.no_grad():
        frozen[1].running_mean += 1
    other.load_state_dict(frozen.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(other.train()(x), frozen.train()(x))
    model.load_state_dict(frozen.state_dict())
    torch.testing.assert_close(model.eval()(x), frozen(x))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_a_frozen_model_can_be_saved_whole(kind):
    frozen = apply_policy(nn.Sequential(kind(4)), "frozen")
    nn.init.normal_(frozen[0].weight)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded[0]) is type(frozen[0])
    assert isinstance(loaded[0], kind)
    assert not loaded.train()[0].training
    assert torch.equal(loaded[0].weight, frozen[0].weight)
    assert repr(loaded) == repr(frozen)


def test_freezing_twice_is_freezing_once(model):
    kind = type(apply_policy(model, "frozen")[1])
    assert type(apply_policy(model, "frozen")[1]) is kind


def test_other_models_are_not_frozen(model, small_mlp):
    apply_policy(model, "frozen")
    assert small_mlp().train()[1].training


def test_an_unknown_policy_is_refused(model):
    with pytest.raises(ValueError, match=r"'frozen', 'merged'.*got 'averaged'"):
        apply_policy(model, "averaged")


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [
        (1, [1]),
        (3, [3]),
        (4, [4]),
        (5, [5]),
        (6, [4, 2]),
        (8, [4, 4]),
        (9, [4, 5]),
        (11, [4, 4, 3]),
    ],
)
def test_a_single_last_sample_joins_the_batch_before_it(model, samples, sizes):
    assert batch_sizes(samples, 4, model.train()) == sizes


@pytest.mark.parametrize("samples", range(1, 12))
def test_without_batch_statistics_batches_are_as_everywhere(model, samples):
    usual = [len(part) for part in torch.arange(samples).split(4)]
    assert batch_sizes(samples, 4, nn.Linear(2, 2).train()) == usual
    assert batch_sizes(samples, 4, apply_policy(model, "frozen").train()) == usual
    assert batch_sizes(samples, 1, model) == [1] * samples
