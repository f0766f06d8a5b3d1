import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from eclm_flower.modular import modularize, slim_resnet, top_k_gates


def in_bytes(network):
    return sum(p.numel() * p.element_size() for p in network.parameters())


def gated_model(perturb, top_k=None):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Linear(64, 10))
    model = modularize(
        body,
        modules_per_layer=8,
        example_input=torch.zeros(1, 64),
        selector_share=0.2,
        gating="selector",
        top_k=top_k,
    )
    perturb(model.selector)
    return model


@pytest.mark.parametrize("build", [resnet18, slim_resnet])
def test_the_selector_takes_at_most_2_percent_of_the_bytes(build):
    model = modularize(build(num_classes=10), example_input=torch.zeros(1, 3, 32, 32))
    assert in_bytes(model.selector) <= 0.02 * in_bytes(model.body)
    logits = model.selector(torch.zeros(2, 3, 32, 32))
    assert list(logits) == list(model.layers)
    assert all(scores.shape == (2, 16) for scores in logits.values())


def test_a_tiny_model_is_told_what_its_selector_takes(small_mlp):
    with pytest.warns(UserWarning, match="cloud model's") as record:
        model = modularize(small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6))
    share = in_bytes(model.selector) / in_bytes(model.body)
    assert share > 0.02
    assert f"{share:.1%} of the cloud model's" in str(record[0].message)
    assert record[0].filename == __file__


def test_every_module_and_the_selector_get_a_gradient(perturb):
    """Invariant 3."""
    model = gated_model(perturb)
    x, y = torch.randn(16, 64), torch.randint(10, (16,))
    nn.functional.cross_entropy(model(x), y).backward()
    for layer in model.layers.values():
        for key in layer.axes:
            gradient = layer.packed(key, model.body.get_parameter(key).grad)
            assert (gradient.flatten(1).norm(dim=1) > 0).all()
    for parameter in model.selector.parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0
    assert (model.selector.heads.weight.grad.norm(dim=1) > 0).all()  # a row a module


def test_an_untrained_selector_learns_from_the_first_step(small_mlp):
    with pytest.warns(UserWarning, match="selector"):
        model = modularize(
            small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6), gating="selector"
        )
    model(torch.randn(8, 6)).square().sum().backward()
    assert (model.selector.heads.bias.grad.abs() > 0).all()


def test_changing_a_module_changes_no_other(perturb):
    """Invariant 3: of all one-module sub-models only that one's output moves."""
    model = gated_model(perturb)
    model.gating = "uniform"
    x = torch.randn(4, 64)
    (layer,) = model.layers.values()
    before = [model.sub_model({"0": [i]})(x) for i in range(8)]
    with torch.no_grad():
        for key in layer.axes:
            layer.packed(key, model.body.state_dict()[key])[5] += 1
    moved = [not torch.equal(model.sub_model({"0": [i]})(x), before[i]) for i in range(8)]
    assert moved == [i == 5 for i in range(8)]


@given(seed=st.integers(0, 2**31), modules=st.integers(1, 12), data=st.data())
def test_top_k_gates_are_a_distribution_over_the_k_largest(seed, modules, data):
    top_k = data.draw(st.none() | st.integers(1, modules + 2))
    logits = 5 * torch.randn(6, modules, generator=torch.Generator().manual_seed(seed))
    gates = top_k_gates(logits, top_k)
    used = min(top_k or modules, modules)
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(6))
    assert ((gates > 0).sum(dim=1) == used).all()
    by_logit, by_gate = logits.topk(used, dim=1).indices, gates.topk(used, dim=1).indices
    assert torch.equal(by_logit, by_gate)
    torch.testing.assert_close(  # among the k, gates are in the ratio of exp(logits)
        gates.gather(1, by_logit), logits.gather(1, by_logit).softmax(dim=1)
    )


def test_an_input_uses_top_k_modules(perturb):
    model = gated_model(perturb, top_k=2)
    (gates,) = model.gates(model.selector(torch.randn(9, 64))).values()
    assert ((gates > 0).sum(dim=1) == 2).all()
    torch.testing.assert_close(gates.sum(dim=1), torch.full((9,), 2.0))


@torch.no_grad()
def test_importance_is_the_mean_gate_over_the_samples(perturb):
    model = gated_model(perturb)
    x, y = torch.randn(10, 64), torch.zeros(10)
    expected = model.selector(x)["0"].softmax(dim=1).mean(dim=0).numpy()
    assert expected.max() > 1.1 * expected.min()
    importance = model.importance([(x[:7], y[:7]), (x[7:], y[7:])])  # batches of unequal size
    assert list(importance) == ["0"]
    assert importance["0"].dtype == np.float64
    np.testing.assert_allclose(importance["0"], expected, rtol=1e-5)
    np.testing.assert_allclose(importance["0"].sum(), 1)
    np.testing.assert_array_equal(model.importance([x[:7], x[7:]])["0"], importance["0"])


def test_importance_of_no_data_is_refused(perturb):
    with pytest.raises(ValueError, match="at least one sample"):
        gated_model(perturb).importance([])


def test_importance_does_not_depend_on_the_modules_held(perturb):
    model = gated_model(perturb)
    x = torch.randn(10, 64)
    np.testing.assert_array_equal(
        model.sub_model({"0": [3]}).importance([x])["0"], model.importance([x])["0"]
    )
