import pytest
import torch
from torch import nn

from eclm_flower.errors import ModularizationError
from eclm_flower.modular import modularize, split_between
from eclm_flower.modular.families import _families, register, registered, splits_of

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


class MyBlock(nn.Module):
    """A user's own block: two convolutions around a batch norm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 3, 1)

    def forward(self, x):
        return x + self.second(torch.relu(self.norm(self.first(x))))


@pytest.fixture
def my_block_registered():
    @register(MyBlock)
    def split_my_block(block):
        return [split_between(block, into=["first", "norm"], out_of="second")]

    yield
    del _families[MyBlock]


@pytest.mark.usefixtures("my_block_registered")
@torch.no_grad()
def test_a_users_own_block_can_be_cut(perturb):
    torch.manual_seed(0)
    model = perturb(nn.Sequential(MyBlock(), MyBlock())).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    modular = modularize(model, modules_per_layer=4, example_input=x[:1])
    assert list(modular.layers) == ["0", "1"]
    assert "MyBlock" in registered()
    torch.testing.assert_close(modular(x), expected)
    gates = {"0": torch.tensor([[0.0, 1, 0, 1]]), "1": torch.tensor([[1.0, 0, 0, 0]])}
    torch.testing.assert_close(
        modular.sub_model({"0": [1, 3], "1": [0]})(x), modular.forward_gated(x, gates)
    )


def test_a_block_nobody_registered_is_left_whole():
    assert splits_of(MyBlock()) == []


def pairs(*layers):
    return [split.mixer for split in splits_of(nn.Sequential(*layers))]


def test_linear_layers_of_an_mlp_are_cut_in_disjoint_pairs():
    linear = [nn.Linear(8, 8) for _ in range(5)]
    assert pairs(*linear[:1]) == []
    assert pairs(*linear[:2]) == ["1"]
    assert pairs(*linear[:3]) == ["1"]
    assert pairs(*linear) == ["1", "3"]


@pytest.mark.parametrize("between", [nn.LayerNorm(8), nn.Softmax(dim=1), nn.Flatten()])
def test_neurons_that_are_mixed_are_not_cut(between):
    assert pairs(nn.Linear(4, 8), between, nn.Linear(8, 4)) == []
    assert pairs(nn.Linear(4, 8), between, nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)) == ["4"]


def block(**layers):
    return nn.ModuleDict(layers)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ({"a": nn.LayerNorm(8), "b": nn.Linear(8, 2)}, "'a' to act on each hidden unit alone"),
        ({"a": nn.Linear(4, 8), "b": nn.LayerNorm(8)}, "'b' to be a linear or convolution"),
        ({"a": nn.Conv2d(4, 8, 1), "b": nn.Conv2d(8, 8, 1, groups=2)}, "'b' is a grouped"),
        ({"a": nn.Conv2d(4, 8, 1, groups=2), "b": nn.Conv2d(8, 2, 1)}, "'a' is a grouped"),
        ({"a": nn.Linear(4, 6), "b": nn.Linear(8, 2)}, "'a' to have a row for each of the 8"),
    ],
)
def test_what_can_not_be_cut_exactly_is_refused(layers, problem):
    with pytest.raises(ModularizationError, match=problem):
        split_between(block(**layers), into=["a"], out_of="b")
