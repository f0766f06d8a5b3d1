"""How delta modules are trained, and how far they are trusted."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from eclm_flower.adaptation.sub_tasks import mixture_from_importance
from eclm_flower.errors import PrototypingError
from eclm_flower.modular import modularize
from eclm_flower.modular.deltas import equal_mixture
from eclm_flower.modular.selector import DELTAS
from eclm_flower.prototyping import PrototypingConfig, accuracy, prototype
from eclm_flower.prototyping.delta_scale import choose_scale
from eclm_flower.prototyping.proxy import ProxyData
from eclm_flower.prototyping.stages import (
    mean_gates,
    train_as_deployed,
    train_deltas,
    train_selector,
)

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


# Digits as they are, and upside down: the same classes in two environments.
IMAGES = torch.tensor(load_digits().images / 16, dtype=torch.float32)
TURNED = torch.arange(len(IMAGES)) % 2
X = torch.where(TURNED[:, None, None] == 1, IMAGES.flip(1), IMAGES).flatten(1)
Y = torch.tensor(load_digits().target)
ORDER = torch.randperm(len(Y), generator=torch.Generator().manual_seed(0))
PROXY, HELD_OUT = (
    ProxyData(TensorDataset(X[rows], Y[rows]), TURNED[rows])
    for rows in (ORDER[:1000], ORDER[1000:])
)
CONFIG = PrototypingConfig(
    enhancing_epochs=120,
    delta_share=0.67,
    budget_shares=(0.25,),
    sub_tasks_per_device=(1, 1),
    whole_samples=16,
    delta_rate=10,
)


def build(*, deltas=True, sub_tasks=2):
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    model = modularize(
        body, modules_per_layer=8, example_input=X[:1], selector_share=0.5, sub_tasks=sub_tasks
    )
    if deltas:
        model.add_deltas()
    return model


def all_zero(model):
    return not any(tensor.any() for tensor in model.deltas.tensors.values())


def quarter(sub_tasks, budget, rng):
    return {"0": range(2)}


def trained(config=CONFIG, *, deltas=True):
    model = build(deltas=deltas)
    generator = torch.Generator().manual_seed(0)
    epochs = config.enhancing_epochs - config.delta_epochs
    stage = train_as_deployed(model, PROXY, quarter, config, generator, epochs=epochs)
    assert len(list(stage)) == epochs
    if deltas:
        stage = train_deltas(model, PROXY, quarter, config, generator)
        assert len(list(stage)) == config.delta_epochs
    return model.eval()


def in_environment(number):
    x, y = HELD_OUT.data.tensors
    own = HELD_OUT.sub_tasks == number
    return TensorDataset(x[own], y[own])


def as_sent(model, sub_tasks):
    sub_model = model.sub_model({"0": range(2)})
    difference = model.deltas.difference({"0": range(2)}, equal_mixture(sub_tasks, 2))
    with torch.no_grad():
        for key, parameter in sub_model.named_parameters():
            parameter += difference[key]
    return sub_model


@pytest.fixture(scope="module")
def specialised():
    """A model with deltas, and a selector that tells their sub-tasks apart."""
    model = trained()
    generator = torch.Generator().manual_seed(0)
    config = PrototypingConfig(selector_epochs=30, selector_learning_rate=1e-2)
    list(train_selector(model, PROXY, {DELTAS: torch.eye(2)}, config, generator))
    gates = mean_gates(model.selector, PROXY)[DELTAS]
    assert np.diag(gates).min() > 0.7
    model.deltas.gates.copy_(torch.from_numpy(gates))
    return model


def test_deltas_learn_what_is_different_in_an_environment(specialised):
    right, wrong, shared = [], [], []
    for number in (0, 1):
        test = in_environment(number)
        right.append(accuracy(as_sent(specialised, [number]), test))
        wrong.append(accuracy(as_sent(specialised, [1 - number]), test))
        shared.append(accuracy(specialised.sub_model({"0": range(2)}), test))
    assert sum(right) / 2 > sum(shared) / 2 + 0.02
    assert sum(shared) / 2 > sum(wrong) / 2 + 0.02


def scaled(model, by=1.0):
    """A copy of the model, its deltas multiplied, and what choosing a scale makes of it."""
    result = build()
    result.load_state_dict(model.state_dict())
    with torch.no_grad():
        for tensor in result.deltas.tensors.values():
            tensor.mul_(by)
    return choose_scale(result, HELD_OUT, quarter, CONFIG), result


def test_the_scale_is_chosen_by_held_out_accuracy(specialised):
    accuracies, result = scaled(specialised)
    assert list(accuracies) == [0.0, 0.5, 1.0]
    assert max(accuracies, key=accuracies.get) == 1.0
    for key, tensor in specialised.deltas.tensors.items():
        assert torch.equal(result.deltas.tensors[key], tensor)


def test_deltas_that_harm_or_do_nothing_are_not_used(specialised):
    for by in (-1.0, 0.0):
        assert all_zero(scaled(specialised, by)[1])


def test_deltas_of_sub_tasks_that_are_taken_for_others_are_not_used(specialised):
    model = build()
    model.load_state_dict(specialised.state_dict())
    with torch.no_grad():  # each of the two looks like the other
        for tensor in (model.selector.heads.weight, model.selector.heads.bias):
            tensor[-2:] = tensor[-2:].flip(0)
    accuracies = choose_scale(model, HELD_OUT, quarter, CONFIG)
    assert accuracies[1.0] < accuracies[0.0]
    assert all_zero(model)


def test_the_model_is_as_without_deltas_to_the_last_bit():
    config = PrototypingConfig(enhancing_epochs=3, budget_shares=(0.25,))
    with_deltas, plain = trained(config), trained(config, deltas=False)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, with_deltas.state_dict()[key])
    assert all(tensor.count_nonzero() > 0 for tensor in with_deltas.deltas.tensors.values())


def test_deltas_learn_at_a_rate_of_their_own():
    sizes = []
    for rate in (1.0, 3.0):
        config = PrototypingConfig(enhancing_epochs=3, budget_shares=(0.25,), delta_rate=rate)
        tensors = trained(config).deltas.tensors.values()
        sizes.append(sum(float(tensor.detach().norm()) for tensor in tensors))
    assert sizes[1] > 1.5 * sizes[0]


def test_the_steps_of_deltas_are_clipped_too():
    config = PrototypingConfig(enhancing_epochs=3, budget_shares=(0.25,), clip_norm=1e-9)
    tensors = trained(config).deltas.tensors.values()
    assert all(tensor.abs().max() < 1e-6 for tensor in tensors)


SHORT = PrototypingConfig(epochs=2, selector_epochs=2, enhancing_epochs=3, delta_scales=(1.0,))


def test_the_offline_stage_makes_nested_sub_models_with_deltas():
    model = build(deltas=False)
    report = prototype(model, PROXY.data, sub_tasks=PROXY.sub_tasks, config=SHORT, progress=False)
    assert not all_zero(model)
    assert list(report.delta_scales) == [1.0]
    stages = ["whole model", "selector", "sub-models as deployed", "delta modules"]
    assert list(report.losses) == stages
    assert [len(report.losses[stage]) for stage in stages[2:]] == [2, 1]
    gates = model.importance([X[:50]])
    assert (np.diff(gates["0"]) < 0).all()
    np.testing.assert_allclose(gates["0"], model.importance([X[50:90]])["0"])
    np.testing.assert_allclose(model.deltas.gates.sum(dim=1), 1)


def test_without_a_share_of_the_epochs_there_are_no_deltas():
    model = build(deltas=False)
    config = PrototypingConfig(epochs=1, enhancing_epochs=1, delta_share=0)
    report = prototype(model, PROXY.data, sub_tasks=PROXY.sub_tasks, config=config, progress=False)
    assert model.deltas is None
    assert report.delta_scales == {}
    assert "selector" not in report.losses  # there is nothing to tell apart


def test_sub_tasks_that_the_proxy_data_lacks_start_from_zero_and_are_nobodys_guess():
    model = build(deltas=False, sub_tasks=3)
    prototype(model, PROXY.data, sub_tasks=PROXY.sub_tasks, config=SHORT, progress=False)
    for tensor in model.deltas.tensors.values():
        assert tensor[:2].any()
        assert not tensor[2].any()
    np.testing.assert_allclose(model.deltas.gates.sum(dim=1), 1)
    assert model.deltas.gates[2].tolist() == [0, 0, 1]
    gates = {DELTAS: model.deltas.gates.numpy()}
    for known in (0, 1):
        x = X[ORDER[:1000]][PROXY.sub_tasks == known]
        mixture = mixture_from_importance(model.importance([x]), gates)
        assert mixture.argmax() == known
        assert mixture[2] < 0.05


def test_more_sub_tasks_than_the_models_are_refused():
    with pytest.raises(PrototypingError, match=r"at most the 2 sub-tasks the model was .* got 3"):
        prototype(
            build(deltas=False),
            PROXY.data,
            sub_tasks=torch.arange(len(PROXY)) % 3,
            config=SHORT,
            progress=False,
        )


def test_what_is_held_out_are_the_last_samples_of_each_sub_task():
    tasks = torch.tensor([0, 1, 0, 0, 1, 0, 0])
    data = ProxyData(TensorDataset(torch.arange(7.0)[:, None], torch.zeros(7)), tasks, max)
    kept, held_out = data.split(0.4)
    assert kept.data.tensors[0].flatten().tolist() == [0, 1, 2, 3]
    assert held_out.data.tensors[0].flatten().tolist() == [4, 5, 6]
    assert held_out.sub_tasks.tolist() == [1, 0, 0]
    assert (kept.augment, held_out.augment) == (max, None)
    alone = ProxyData(data.data, torch.tensor([0, 1, 0, 0, 0, 0, 0]))
    with pytest.raises(PrototypingError, match="at least 2 samples of each sub-task"):
        alone.split(0.4)
