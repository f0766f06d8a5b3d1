"""Delta modules: their shapes, and what is merged into a sub-model."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eclm_flower.errors import ModularizationError
from eclm_flower.modular import modularize, slim_resnet
from eclm_flower.modular.deltas import DeltaModules, equal_mixture
from eclm_flower.modular.selector import DELTAS

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")
S = 3


def with_deltas(small_mlp, core_share=0.5):
    """A model whose deltas are not zero any more."""
    model = modularize(
        small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6), sub_tasks=S
    )
    model.deltas = DeltaModules(model.body, model.layers.values(), S, core_share=core_share)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.deltas.tensors.values():
            tensor.normal_(generator=generator)
    return model


@pytest.fixture
def model(small_mlp):
    return with_deltas(small_mlp)


def chosen(model, number=4):
    return {name: range(number) for name in model.layers}


def merged(model, selection, mixture):
    return model.deltas.merged(model.narrowed_state(selection), selection, mixture)


def test_deltas_are_zero_at_the_start(model):
    assert all(tensor.any() for tensor in model.deltas.tensors.values())
    model.add_deltas()
    assert not any(tensor.any() for tensor in model.deltas.tensors.values())
    for mixture in ([1, 0, 0], [0.2, 0.3, 0.5]):
        plain = model.narrowed_state(chosen(model, 2))
        state = merged(model, chosen(model, 2), mixture)
        assert all(torch.equal(tensor, plain[key]) for key, tensor in state.items())


@given(data=st.data())
def test_a_sub_model_is_cut_out_of_the_whole_model_with_its_deltas(data, small_mlp):
    """To merge into what was cut out is to cut out of what was merged."""
    model = with_deltas(small_mlp, data.draw(st.sampled_from([0.25, 0.5, 1.0])))
    parts = data.draw(st.lists(st.integers(1, 9), min_size=S, max_size=S))
    mixture = torch.tensor(parts) / sum(parts)
    selection = {
        name: data.draw(st.sets(st.integers(0, 3), min_size=1).map(sorted)) for name in model.layers
    }
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in whole.body.named_parameters():
            differences = model.deltas.tensors[key]
            weights = (mixture - 1 / S).clamp(min=0) * S / (S - 1)
            difference = sum(w * d for w, d in zip(weights, differences, strict=True))
            for layer in whole.layers.values():
                if key in layer.axes:
                    own = layer.packed(key, difference)
                    layer.packed(key, parameter.data)[: model.deltas.core[layer.name]] += own
                    break
            else:
                parameter += difference
    result, expected = merged(model, selection, mixture), whole.narrowed_state(selection)
    assert result.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(result[key], tensor, atol=1e-6, rtol=1e-5)


def test_who_is_not_known_gets_the_shared_weights(model):
    shared = model.narrowed_state(chosen(model))
    unknown = merged(model, chosen(model), equal_mixture(range(S), S))
    known = merged(model, chosen(model), [1, 0, 0])
    for key, parameter in model.body.named_parameters():
        torch.testing.assert_close(unknown[key], shared[key])
        assert not torch.allclose(known[key], parameter)


@pytest.mark.parametrize("number", range(2, 12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_shares_are_no_sub_task_at_any_precision(small_mlp, number, dtype):
    model = modularize(
        small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6), sub_tasks=number
    )
    weights = model.add_deltas().weights(torch.full((number,), 1 / number, dtype=dtype))
    assert not weights.any()


def test_a_device_of_one_sub_task_gets_its_difference_whole(model):
    everything = chosen(model)
    for s in range(S):
        alone = model.deltas.difference(everything, equal_mixture([s], S))
        for layer in model.layers.values():
            for key in layer.axes.keys() & alone.keys():
                own = model.deltas.tensors[key][s]
                torch.testing.assert_close(
                    layer.packed(key, alone[key])[:2], layer.packed(key, own)
                )
                assert not layer.packed(key, alone[key])[2:].any()  # beyond the core


def test_gradients_reach_the_shared_weights_and_the_deltas(model):
    state = merged(model, chosen(model, 2), [1, 0, 0])
    sum(tensor.sum() for tensor in state.values() if tensor.is_floating_point()).backward()
    for key, parameter in model.body.named_parameters():
        assert parameter.grad.abs().sum() > 0
        assert model.deltas.tensors[key].grad[0].abs().sum() > 0


def test_the_cloud_stores_a_core_for_each_sub_task():
    model = modularize(slim_resnet(), example_input=torch.zeros(1, 3, 32, 32), sub_tasks=5)
    quarter = {name: range(layer.modules // 4) for name, layer in model.layers.items()}
    core = sum(p.numel() * 4 for p in model.sub_model(quarter).parameters())
    assert sum(tensor.numel() * 4 for tensor in model.add_deltas().tensors.values()) == 5 * core


def test_deltas_are_saved_with_the_cloud_model(model, small_mlp, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = with_deltas(small_mlp)
    again.add_deltas()
    again.deltas = DeltaModules(again.body, again.layers.values(), S, core_share=0.5)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for key, tensor in model.deltas.tensors.items():
        assert torch.equal(tensor, again.deltas.tensors[key])


def test_a_saved_state_brings_its_delta_modules_along(model, small_mlp):
    with torch.no_grad():
        for tensor in model.add_deltas().tensors.values():
            tensor.normal_()
    fresh = modularize(
        small_mlp(), modules_per_layer=4, example_input=model.example_input, sub_tasks=S
    )
    assert fresh.deltas is None
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(dict(fresh.state_dict()), dict(model.state_dict()), atol=0, rtol=0)


def test_devices_have_none(model):
    assert not any("deltas" in key for key in model.sub_model(chosen(model, 2)).state_dict())


def test_the_selector_has_gates_for_sub_tasks(model):
    importance = model.importance([torch.randn(7, 6)])
    assert set(importance) == {*model.layers, DELTAS}
    assert importance[DELTAS].shape == (S,)
    assert importance[DELTAS].sum() == pytest.approx(1)


def test_modules_preferred_in_order_are_so_for_every_input(model):
    (first, *others) = model.layers
    before = model.importance([torch.randn(9, 6)])
    model.selector.prefer_in_order(first, by=0.5)
    for seed in (0, 1):
        torch.manual_seed(seed)
        gates = model.importance([torch.randn(9, 6)])[first]
        np.testing.assert_allclose(gates[1:] / gates[:-1], np.exp(-0.5), rtol=1e-6)
    after = model.importance([torch.randn(9, 6)])
    assert all(after[name].shape == before[name].shape for name in others)


def test_impossible_deltas_are_refused(model, small_mlp):
    for sub_tasks, core_share, problem in ((0, 0.5, "1 sub-task"), (2, 0, "above 0"), (2, 2, "1")):
        with pytest.raises(ModularizationError, match=problem):
            DeltaModules(model.body, model.layers.values(), sub_tasks, core_share=core_share)
    with pytest.raises(ValueError, match=r"mixture of 3 sub-tasks, got \[2\]"):
        model.deltas.difference(chosen(model), [1, 0])
    options = {"example_input": torch.zeros(1, 6), "modules_per_layer": 4}
    with pytest.raises(ModularizationError, match="0 with gating 'selector', got 3"):
        modularize(small_mlp(), **options, sub_tasks=S, gating="selector")
    with pytest.raises(ModularizationError, match="of some sub-tasks"):
        modularize(small_mlp(), **options).add_deltas()
