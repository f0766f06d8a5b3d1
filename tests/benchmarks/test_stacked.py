import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.captured import train_captured
from benchmarks.stacked import StackingError, stackable, train_stacked
from eclm_flower import modularize
from eclm_flower.modular import apply_policy, slim_resnet
from simulations.models import MODELS
from strategies.local_training import train

CLASSES = 3


def training(**options):
    usual = {"learning_rate": 0.05, "batch_size": 4, "local_epochs": 2, "masked_loss": False}
    return SimpleNamespace(**{**usual, **options})


def mlp():
    """Every kind of layer and tensor that a sub-model may have: frozen ones, too."""
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)
    )
    model[3].bias.requires_grad_(False)
    return model


def slim_part():
    whole = modularize(slim_resnet(num_classes=CLASSES), example_input=torch.zeros(1, 3, 32, 32))
    return whole.sub_model(dict.fromkeys(whole.layers, (0, 5)))


def resnet_part():
    """With batch norm, some of it cut."""
    body = MODELS["resnet18"]((3, 8, 8), CLASSES)
    whole = modularize(body, example_input=torch.zeros(1, 3, 8, 8))
    return whole.sub_model(dict.fromkeys(whole.layers, (3,)))


def data_of(shape, samples, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [
        TensorDataset(
            torch.randn(n, *shape, generator=random),
            torch.randint(CLASSES, (n,), generator=random),
        )
        for n in samples
    ]


def copies(build, perturb, k):
    """k models with weights and statistics of their own, batch norm frozen."""
    torch.manual_seed(0)
    model = build()
    return [
        apply_policy(perturb(copy.deepcopy(model), seed=number), "frozen") for number in range(k)
    ]


def generators(k, seed=0):
    return [torch.Generator().manual_seed(seed + number) for number in range(k)]


def assert_same_as_alone(models, data, settings, seed=0, tolerance=1e-5):
    alone = copy.deepcopy(models)
    before = copy.deepcopy(models)
    together = train_stacked(models, data, settings, generators(len(models), seed))
    for number, generator in enumerate(generators(len(models), seed)):
        loss = train(alone[number], data[number], settings, generator)
        assert together[number] == pytest.approx(loss, rel=10 * tolerance, abs=tolerance)
        state = models[number].state_dict()
        for name, tensor in alone[number].state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=tolerance, atol=tolerance)
        learnt = [n for n, p in models[number].named_parameters() if p.requires_grad]
        untouched = before[number].state_dict()
        assert any(not torch.equal(state[name], untouched[name]) for name in learnt)


@settings(max_examples=40)
@given(
    samples=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    batch_size=st.integers(1, 6),
    local_epochs=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_models_become_what_they_become_alone(perturb, samples, batch_size, local_epochs, seed):
    models = copies(mlp, perturb, len(samples))
    how = training(batch_size=batch_size, local_epochs=local_epochs)
    assert_same_as_alone(models, data_of((5,), samples, seed), how, seed)


@pytest.mark.parametrize(
    ("build", "shape"), [(slim_part, (3, 32, 32)), (resnet_part, (3, 8, 8))], ids=["slim", "resnet"]
)
def test_convolutional_sub_models_too(perturb, build, shape):
    models = copies(build, perturb, 3)
    how = training(learning_rate=0.01)
    assert_same_as_alone(models, data_of(shape, [3, 9, 6]), how, tolerance=1e-4)


def test_what_is_not_trained_stays_bit_for_bit(perturb):
    models = copies(mlp, perturb, 2)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    train_stacked(models, data_of((5,), [6, 9]), training(), generators(2))
    for model, state in zip(models, before, strict=True):
        for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked", "3.bias"):
            assert torch.equal(model.state_dict()[name], state[name])


def test_models_of_other_shapes_are_refused(perturb):
    models = [*copies(mlp, perturb, 1), nn.Sequential(nn.Linear(5, 3))]
    with pytest.raises(StackingError, match="differ in nothing"):
        train_stacked(models, data_of((5,), [4, 4]), training(), generators(2))


def test_layers_that_compute_otherwise_are_refused_though_their_tensors_fit():
    models = [nn.Sequential(nn.Linear(5, 3), kind()) for kind in (nn.ReLU, nn.GELU)]
    with pytest.raises(StackingError, match="differ in nothing"):
        train_stacked(models, data_of((5,), [4, 4]), training(), generators(2))


def gated():
    whole = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return modularize(whole, example_input=torch.zeros(1, 5), gating="selector")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)),
        lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.1)),
        gated,
    ],
    ids=["batch norm that trains", "dropout", "gates"],
)
@pytest.mark.filterwarnings("ignore:The narrowest selector")
def test_models_that_do_more_than_their_tensors_say_are_refused(build):
    model = build()
    assert not stackable(model.train())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StackingError, match="plain model"):
        train_stacked([model], data_of((5,), [4]), training(), generators(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_of_nothing_is_stackable():
    assert stackable(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.0)).train())


@pytest.mark.parametrize("streams", [1, 3])
def test_captured_steps_make_of_models_what_training_alone_does(perturb, streams):
    models = copies(mlp, perturb, 4)
    data = data_of((5,), [3, 11, 4, 7])
    alone = copy.deepcopy(models)
    losses = train_captured(models, data, training(), generators(4), streams=streams)
    for number, generator in enumerate(generators(4)):
        loss = train(alone[number], data[number], training(), generator)
        assert losses[number] == pytest.approx(loss, rel=1e-4, abs=1e-5)
        for name, tensor in alone[number].state_dict().items():
            torch.testing.assert_close(
                models[number].state_dict()[name], tensor, rtol=1e-5, atol=1e-5
            )


def test_what_a_captured_step_would_get_wrong_is_refused():
    trains = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    with pytest.raises(StackingError, match="batch norm frozen"):
        train_captured([trains], data_of((5,), [4]), training(), generators(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("streams", [1, 3])
def test_captured_steps_on_a_gpu(perturb, streams):
    models = [model.cuda() for model in copies(slim_part, perturb, 3)]
    data = [
        TensorDataset(*(t.cuda() for t in own.tensors)) for own in data_of((3, 32, 32), [3, 9, 6])
    ]
    alone = copy.deepcopy(models)
    before = copy.deepcopy(models)
    how = training(learning_rate=0.01)
    train_captured(models, data, how, generators(3), streams=streams)
    for number, generator in enumerate(generators(3)):
        train(alone[number], data[number], how, generator)
        untouched = dict(before[number].named_parameters())
        state = dict(models[number].named_parameters())
        for name, tensor in alone[number].named_parameters():
            assert not torch.equal(state[name], untouched[name])
            torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-3)  # TF32
