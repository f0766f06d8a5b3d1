import pytest
import torch

from eclm_flower.modular import top_k_gates
from eclm_flower.prototyping.gating_noise import balance_loss, noisy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_no_noise_changes_nothing():
    logits = torch.randn(5, 4)
    assert noisy(logits, 0, generator()) is logits


def test_noise_has_the_size_asked_for_and_a_seed():
    logits = torch.zeros(2000, 4)
    noised = noisy(logits, 0.5, generator(1))
    assert noised.std() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(noised, noisy(logits, 0.5, generator(1)))
    assert not torch.equal(noised, noisy(logits, 0.5, generator(2)))


def loss_of(logits, top_k, noise):
    noised = noisy(logits, noise, generator())
    return balance_loss(logits, noised, top_k_gates(noised, top_k), top_k, noise)


def balanced(modules=4):
    """Each sample prefers another module."""
    return 5 * torch.eye(modules).repeat(3, 1)


def collapsed(modules=4):
    """All samples prefer the same module."""
    return 5 * torch.eye(modules)[:1].repeat(3 * modules, 1)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balanced_gates_cost_nothing(top_k):
    logits = torch.stack([torch.arange(4.0).roll(i) for i in range(4)])
    assert loss_of(logits, top_k, noise=0) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("noise", [0, 0.1])
def test_collapsed_gates_cost_more(top_k, noise):
    assert loss_of(collapsed(), top_k, noise) > loss_of(balanced(), top_k, noise) + 0.5


def test_the_loss_is_the_squared_variation_of_importance():
    gates = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # importance 1.5 and 0.5
    loss = balance_loss(gates, gates, gates, 2, 0)
    assert loss == pytest.approx(0.25)


def test_load_is_the_expected_number_of_inputs_that_use_a_module():
    """Against sampling the noise again for one module at a time (Shazeer et al., equation 8)."""
    clean = torch.randn(6, 5, generator=generator(1))
    noised = noisy(clean, 1.0, generator(2))
    gates = top_k_gates(noised, 2)
    load = torch.zeros(5)
    for sample in range(6):
        for module in range(5):
            others = torch.cat([noised[sample, :module], noised[sample, module + 1 :]])
            again = clean[sample, module] + torch.randn(20_000, generator=generator(3))
            load[module] += (again > others.topk(2).values[-1]).float().mean()
    importance = gates.sum(dim=0)
    expected = sum(v.var(correction=0) / v.mean() ** 2 for v in (importance, load))
    assert balance_loss(clean, noised, gates, 2, 1.0) == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize("noise", [0, 1.0])
def test_descending_the_loss_spreads_collapsed_gates(noise):
    logits = collapsed().requires_grad_()
    loss = loss_of(logits, 2, noise)
    loss.backward()
    assert logits.grad.norm() > 0
    with torch.no_grad():
        logits -= 10 * logits.grad
    assert loss_of(logits, 2, noise) < loss
