"""A device's class prior: what it adds, and that nothing of it remains."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eclm_flower import class_prior, modularize
from eclm_flower.adaptation.class_prior import log_prior

CLASSES = 4
labels_of_devices = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=50)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))


@given(labels=labels_of_devices, unlike=st.floats(1e-6, 0.5))
def test_logits_move_by_the_logarithm_of_how_much_likelier_a_class_is_here(labels, unlike):
    model, x = network(), torch.randn(5, 6)
    before = model(x)
    with class_prior(model, labels, unlike=unlike):
        moved = (model(x) - before).detach().double()
    own = np.bincount(labels, minlength=CLASSES) / len(labels)
    expected = np.log((1 - unlike) * own * CLASSES + unlike)
    np.testing.assert_allclose(moved, np.tile(expected, (5, 1)), atol=1e-5)


def test_with_it_a_cloud_model_is_as_good_as_one_made_for_the_device():
    """Bayes: if only the shares of classes differ, the shares are all a posterior lacks."""
    cloud, device = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    likelihood = np.random.default_rng(0).random((CLASSES, 7))
    labels = np.repeat(range(CLASSES), (device * 10).astype(int)).tolist()
    logits = torch.from_numpy(np.log(likelihood * cloud[:, None]).T)
    own = logits + log_prior(labels, CLASSES, cloud_shares=cloud, unlike=1e-12)
    posterior = likelihood * device[:, None]
    np.testing.assert_allclose(own.softmax(dim=1), (posterior / posterior.sum(axis=0)).T, rtol=1e-6)


@given(labels=labels_of_devices, data=st.data())
def test_what_training_changed_remains_and_the_prior_does_not(labels, data):
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = data.draw(st.sets(st.integers(0, CLASSES - 1)).map(sorted))
    with class_prior(model, labels), torch.no_grad():
        model[2].bias[trained] += 0.25
        model[0].weight.mul_(2)
    untouched = [c for c in range(CLASSES) if c not in trained]
    assert torch.equal(model[2].bias[untouched], before["2.bias"][untouched])  # bit for bit
    torch.testing.assert_close(model[2].bias[trained], before["2.bias"][trained] + 0.25)
    assert torch.equal(model[0].weight, 2 * before["0.weight"])
    assert model[2].bias.requires_grad


def test_it_is_taken_off_when_training_fails():
    model = network()
    before = model[2].bias.clone()
    with pytest.raises(RuntimeError), class_prior(model, [0]):
        model(torch.zeros(1, 5))
    assert torch.equal(model[2].bias, before)


def test_a_device_like_the_cloud_gets_none():
    shares = [0.5, 0.25, 0.125, 0.125]
    prior = log_prior([0, 0, 0, 0, 1, 1, 2, 3], CLASSES, cloud_shares=shares)
    torch.testing.assert_close(prior, torch.zeros(CLASSES, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:The narrowest selector")
def test_of_a_model_that_holds_a_selector_the_bodys_logits_move():
    model = modularize(network(), modules_per_layer=4, example_input=torch.zeros(1, 6))
    selector = {key: tensor.clone() for key, tensor in model.selector.state_dict().items()}
    with class_prior(model, [1]):
        assert int(model(torch.zeros(1, 6)).argmax()) == 1
        assert all(torch.equal(t, selector[k]) for k, t in model.selector.state_dict().items())


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, r"at least one label, all from 0, as \[n\], got \[0\]\."),
        ([-1, 2], {}, r"all from 0, as \[n\], got \[2\], the least -1\."),
        ([4], {}, "labels below 4, the length of the model's last parameter, got 4"),
        ([0], {"cloud_shares": [1.0]}, "cloud_shares of 4 classes, all above 0"),
        ([0], {"cloud_shares": [1.0, 0, 1, 1]}, "cloud_shares of 4 classes, all above 0"),
        ([0], {"unlike": 0.0}, "unlike between 0 and 1, got 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(labels, options, message):
    with pytest.raises(ValueError, match=message), class_prior(network(), labels, **options):
        pass


def test_a_model_without_a_bias_of_its_logits_is_refused():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, CLASSES, bias=False))
    with (
        pytest.raises(ValueError, match=r"the bias of its logits, got 1.weight \[4, 8\]; give"),
        class_prior(model, [0]),
    ):
        pass
