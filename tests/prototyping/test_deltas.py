"""Delta modules: what is merged, how they train, how far they are trusted."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from eclm_flower.errors import PrototypingError
from eclm_flower.modular import modularize, slim_resnet
from eclm_flower.prototyping import PrototypingConfig, accuracy
from eclm_flower.prototyping.delta_scale import choose_scale
from eclm_flower.prototyping.deltas import DeltaModules, equal_mixture
from eclm_flower.prototyping.proxy import ProxyData
from eclm_flower.prototyping.stages import train_as_deployed

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")
S = 3


def perturbed(model, core_share=0.5):
    """Deltas that are not zero any more."""
    deltas = DeltaModules(model, S, core_share=core_share)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in deltas.tensors.values():
            tensor.normal_(generator=generator)
    return deltas


@pytest.fixture
def model(small_mlp):
    return modularize(small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6))


def chosen(model, number=4):
    return {name: range(number) for name in model.layers}


def test_deltas_are_zero_at_the_start(model):
    deltas, x = DeltaModules(model, S), torch.randn(5, 6)
    for mixture in ([1, 0, 0], [0.2, 0.3, 0.5]):
        sub_model = deltas.sub_model(model, chosen(model, 2), mixture)
        assert torch.equal(sub_model.eval()(x), model.sub_model(chosen(model, 2)).eval()(x))


@given(data=st.data())
def test_a_sub_model_is_cut_out_of_the_whole_model_with_its_deltas(data, small_mlp):
    """To merge into what was cut out is to cut out of what was merged."""
    model = modularize(small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6))
    deltas = perturbed(model, data.draw(st.sampled_from([0.25, 0.5, 1.0])))
    deltas.scale = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    parts = data.draw(st.lists(st.integers(1, 9), min_size=S, max_size=S))
    mixture = torch.tensor(parts) / sum(parts)
    selection = {
        name: data.draw(st.sets(st.integers(0, 3), min_size=1).map(sorted)) for name in model.layers
    }
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in merged.body.named_parameters():
            weights = deltas.scale * (mixture - 1 / S)
            difference = sum(w * d for w, d in zip(weights, deltas.tensors[key], strict=True))
            for layer in merged.layers.values():
                if key in layer.axes:
                    own = layer.packed(key, difference)
                    layer.packed(key, parameter.data)[: deltas.core[layer.name]] += own
                    break
            else:
                parameter += difference
    result = deltas.merged(model.narrowed_state(selection), selection, mixture)
    expected = merged.narrowed_state(selection)
    assert result.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(result[key], tensor, atol=1e-6, rtol=1e-5)


def test_who_is_not_known_gets_the_shared_weights(model):
    deltas, x = perturbed(model), torch.randn(5, 6)
    shared = model.sub_model(chosen(model)).eval()(x)
    unknown = deltas.sub_model(model, chosen(model), equal_mixture(range(S), S)).eval()(x)
    torch.testing.assert_close(unknown, shared)
    assert not torch.allclose(deltas.sub_model(model, chosen(model), [1, 0, 0]).eval()(x), shared)
    deltas.scale = 0.0
    assert torch.equal(deltas.sub_model(model, chosen(model), [1, 0, 0]).eval()(x), shared)


def test_a_device_gets_tensors_of_its_own_and_not_one_more(model):
    deltas = perturbed(model)
    before = copy.deepcopy({**model.state_dict(), **deltas.state_dict()})
    sub_model = deltas.sub_model(model, chosen(model, 2), [1, 0, 0])
    plain = model.sub_model(chosen(model, 2))
    shapes = [{key: t.shape for key, t in m.state_dict().items()} for m in (sub_model, plain)]
    assert shapes[0] == shapes[1]
    with torch.no_grad():
        for parameter in sub_model.parameters():
            parameter.add_(1)
    after = {**model.state_dict(), **deltas.state_dict()}
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())


def test_gradients_reach_the_shared_weights_and_the_deltas(model):
    deltas = perturbed(model)
    state = model.narrowed_state(chosen(model, 2))
    result = deltas.merged(state, chosen(model, 2), [1, 0, 0])
    sum(tensor.sum() for tensor in result.values() if tensor.is_floating_point()).backward()
    for key, parameter in model.body.named_parameters():
        assert parameter.grad.abs().sum() > 0
        assert all(row.abs().sum() > 0 for row in deltas.tensors[key].grad)


def test_the_cloud_stores_a_core_for_each_sub_task():
    model = modularize(slim_resnet(), example_input=torch.zeros(1, 3, 32, 32))
    quarter = {name: range(layer.modules // 4) for name, layer in model.layers.items()}
    core = sum(p.numel() * 4 for p in model.sub_model(quarter).parameters())
    assert DeltaModules(model, 5).num_bytes == 5 * core


def test_deltas_can_be_saved_and_read(model, tmp_path):
    deltas = perturbed(model)
    deltas.scale = 0.5
    save_file(deltas.state_dict(), tmp_path / "deltas.safetensors")
    again = DeltaModules(model, S, core_share=0.5)
    again.load_state_dict(load_file(tmp_path / "deltas.safetensors"))
    assert again.scale == 0.5
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in deltas.tensors.items())
    for other in (DeltaModules(model, S + 1, core_share=0.5), DeltaModules(model, S)):
        with pytest.raises(PrototypingError, match=r"another shape: \['delta\.0"):
            other.load_state_dict(deltas.state_dict())


def test_impossible_deltas_are_refused(model, small_mlp):
    for sub_tasks, core_share, problem in ((0, 0.5, "1 sub-task"), (2, 0, "above 0"), (2, 2, "1")):
        with pytest.raises(PrototypingError, match=problem):
            DeltaModules(model, sub_tasks, core_share=core_share)
    with pytest.raises(PrototypingError, match=r"mixture of 3 sub-tasks, got \[2\]"):
        DeltaModules(model, S).merged(model.narrowed_state(chosen(model)), chosen(model), [1, 0])
    gated = modularize(small_mlp(), example_input=torch.zeros(1, 6), gating="selector")
    with pytest.raises(PrototypingError, match="gating 'uniform' for deltas, got 'selector'"):
        DeltaModules(gated, S)


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
    enhancing_epochs=40,
    budget_shares=(0.25,),
    sub_tasks_per_device=(1, 1),
    whole_samples=16,
    delta_rate=10,
)


def build():
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    return modularize(body, modules_per_layer=8, example_input=X[:1], selector_share=0.3)


def quarter(sub_tasks, budget, rng):
    return {"0": range(2)}


def trained(config=CONFIG, deltas_of=lambda model: None):
    model = build()
    deltas = deltas_of(model)
    generator = torch.Generator().manual_seed(0)
    stage = train_as_deployed(model, PROXY, quarter, config, generator, deltas=deltas)
    assert len(list(stage)) == config.enhancing_epochs
    return model.eval(), deltas


def in_environment(number):
    x, y = HELD_OUT.data.tensors
    own = HELD_OUT.sub_tasks == number
    return TensorDataset(x[own], y[own])


@pytest.fixture(scope="module")
def with_deltas():
    return trained(deltas_of=lambda model: DeltaModules(model, 2))


def test_deltas_learn_what_is_different_in_an_environment(with_deltas):
    model, deltas = with_deltas
    deltas.scale = 1.0
    right, wrong, shared = [], [], []
    for number in (0, 1):
        test = in_environment(number)
        own, other = (
            deltas.sub_model(model, {"0": range(2)}, equal_mixture([s], 2))
            for s in (number, 1 - number)
        )
        right.append(accuracy(own, test))
        wrong.append(accuracy(other, test))
        shared.append(accuracy(model.sub_model({"0": range(2)}), test))
    assert sum(right) / 2 > sum(shared) / 2 + 0.02
    assert sum(shared) / 2 > sum(wrong) / 2 + 0.02


def test_the_scale_is_chosen_by_held_out_accuracy(with_deltas):
    model, deltas = with_deltas
    accuracies = choose_scale(model, deltas, HELD_OUT, quarter, CONFIG)
    assert deltas.scale == 1.0 == max(accuracies, key=accuracies.get)
    assert list(accuracies) == [0.0, 0.5, 1.0]
    assert accuracies[0.0] < accuracies[0.5] < accuracies[1.0]


def test_deltas_that_harm_or_do_nothing_are_not_used(with_deltas):
    model, trained_deltas = with_deltas
    harmful, idle = DeltaModules(model, 2), DeltaModules(model, 2)
    with torch.no_grad():
        for key, tensor in harmful.tensors.items():
            tensor.copy_(-trained_deltas.tensors[key])
    for deltas in (harmful, idle):
        choose_scale(model, deltas, HELD_OUT, quarter, CONFIG)
        assert deltas.scale == 0.0


def test_the_model_trains_as_without_deltas_to_the_last_bit(with_deltas):
    model, deltas = with_deltas
    plain, _ = trained()
    assert all(torch.equal(t, plain.state_dict()[key]) for key, t in model.state_dict().items())
    assert all(tensor.count_nonzero() > 0 for tensor in deltas.tensors.values())


def test_deltas_learn_at_a_rate_of_their_own():
    sizes = []
    for rate in (1.0, 3.0):
        config = PrototypingConfig(enhancing_epochs=1, budget_shares=(0.25,), delta_rate=rate)
        _, deltas = trained(config, lambda model: DeltaModules(model, 2))
        sizes.append(sum(float(tensor.detach().norm()) for tensor in deltas.tensors.values()))
    assert sizes[1] > 1.5 * sizes[0]


def test_the_steps_of_deltas_are_clipped_too():
    config = PrototypingConfig(enhancing_epochs=1, budget_shares=(0.25,), clip_norm=1e-9)
    _, deltas = trained(config, lambda model: DeltaModules(model, 2))
    assert all(tensor.abs().max() < 1e-6 for tensor in deltas.tensors.values())
