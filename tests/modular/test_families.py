from functools import partial

import pytest
import torch
from slim_families import mobilenet_v3, regnet, swin
from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from eclm_flower.errors import CoupledUnitsError, ModularizationError
from eclm_flower.modular import Axis, modularize, split_between
from eclm_flower.modular.families import (
    _families,
    inverted_residual,
    register,
    registered,
    splits_of,
)

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


@pytest.mark.parametrize("mixes", [nn.LayerNorm(8), nn.Softmax(dim=1)])
def test_a_layer_that_mixes_is_seen_wherever_it_is_used(mixes):
    assert pairs(nn.Linear(8, 8), mixes, nn.Linear(8, 8), mixes, nn.Linear(8, 8)) == []
    block = nn.Module()
    dense = [nn.Conv2d(8, 8, 1) for _ in range(3)]
    block.conv = nn.Sequential(nn.Sequential(dense[0], mixes, dense[1], mixes, dense[2]))
    assert inverted_residual.split_v2(block) == []


def test_a_layer_without_tensors_may_be_used_twice():
    relu = nn.ReLU()
    assert pairs(nn.Linear(8, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 8)) == ["2"]
    assert pairs(nn.LayerNorm(8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 8)) == ["4"]


@pytest.mark.parametrize(
    "twice", [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False)]
)
def test_a_layer_with_tensors_that_is_used_twice_is_refused(twice):
    body = nn.Sequential(nn.Linear(8, 8), twice, nn.ReLU(), nn.Linear(8, 8), twice, nn.Linear(8, 2))
    with pytest.raises(CoupledUnitsError, match="are one tensor"):
        modularize(body, example_input=torch.zeros(1, 8))


def test_convolutions_are_cut_with_what_acts_on_each_channel_between_them():
    convolution = [nn.Conv2d(8, 8, 3) for _ in range(4)]
    between = [nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1, groups=8)]
    assert pairs(convolution[0], *between, *convolution[1:]) == ["5", "7"]
    assert pairs(convolution[0], nn.GroupNorm(2, 8), convolution[1]) == []
    assert pairs(convolution[0], nn.Linear(8, 8), convolution[1]) == []


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([nn.LayerNorm(8), nn.Linear(8, 2)], "'0' to be a linear or convolution"),
        ([nn.Linear(4, 8), nn.LayerNorm(8)], "'1' to be a linear or convolution"),
        ([nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2)], "'1' to be .* without groups"),
        ([nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 2, 1)], "'0' to be .* without groups"),
        ([nn.Linear(4, 6), nn.Linear(8, 2)], "'1' to read the 6 outputs .* reads 8"),
        ([nn.Linear(4, 6), nn.BatchNorm1d(8), nn.Linear(6, 2)], "'1' to read the 6"),
        ([nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)], "'1' to act on each hidden unit"),
        ([nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)], "'1' to act on each hidden unit"),
    ],
)
def test_what_can_not_be_cut_exactly_is_refused(layers, problem):
    *into, out_of = map(str, range(len(layers)))
    with pytest.raises(ModularizationError, match=problem):
        split_between(nn.Sequential(*layers), into=into, out_of=out_of)


def test_units_are_the_groups_of_what_stands_between():
    layers = [nn.Conv2d(4, 24, 1), nn.Conv2d(24, 48, 3, groups=24), nn.BatchNorm2d(48)]
    layers += [nn.Conv2d(48, 36, 3, groups=6), nn.Conv2d(36, 2, 1)]
    split = split_between(nn.Sequential(*layers), into=["0", "1", "2", "3"], out_of="4")
    assert split.units == 6
    assert split.axes == {
        **{"0.weight": Axis(0, width=4), "0.bias": Axis(0, width=4)},
        **{f"1.{key}": Axis(0, width=8) for key in ("weight", "bias")},
        **{f"2.{key}": Axis(0, width=8) for key in ("weight", "bias")},
        **{f"2.running_{key}": Axis(0, width=8) for key in ("mean", "var")},
        **{f"3.{key}": Axis(0, width=6) for key in ("weight", "bias")},
        "4.weight": Axis(1, width=6),
    }


def efficientnet():
    return EfficientNet([MBConvConfig(4, 3, 1, 16, 16, 1)], dropout=0.0, num_classes=5)


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (partial(mobilenet_v3, squeeze=True), "'features.1' .InvertedResidual"),
        (partial(regnet, squeeze=True), "'trunk_output.block1.block1-0' .ResBottleneckBlock"),
        (efficientnet, "'features.1.0' .MBConv"),
    ],
)
def test_a_squeeze_and_excite_is_refused_with_the_part_the_reason_and_the_remedy(build, part):
    with pytest.raises(CoupledUnitsError, match=rf"{part}.*squeeze-and-excite.*keep_whole=True"):
        modularize(build(), example_input=torch.zeros(1, 3, 32, 32))


def test_what_can_not_be_cut_may_be_kept_whole():
    torch.manual_seed(0)
    body = mobilenet_v3(squeeze=True).eval()
    x = torch.randn(3, 3, 64, 64)
    expected = body(x)
    model = modularize(body, modules_per_layer=8, example_input=x[:1], keep_whole=True)
    assert list(model.layers) == ["features.2", "classifier"]
    torch.testing.assert_close(model(x), expected)
    for build in (partial(regnet, squeeze=True), efficientnet):
        with pytest.raises(ModularizationError, match="no block to cut"):
            modularize(build(), example_input=x[:1], keep_whole=True)


def test_what_an_outer_block_cuts_is_not_cut_again():
    """Swin V2's position network is a sequence of two linear layers, whose rows are the heads'."""
    body = swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
    model = modularize(body, modules_per_layer=8, example_input=torch.zeros(1, 3, 32, 32))
    keys = [key for layer in model.layers.values() for key in layer.axes]
    assert len(keys) == len(set(keys))
    assert "features.1.0.attn.cpb_mlp.2.weight" in model.layers["features.1.0.attn"].axes
    assert not any("cpb_mlp" in name for name in model.layers)
    of_3_heads = SwinTransformer(
        *([2, 2], 24, [2], [3], [4, 4]),
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )
    model = modularize(of_3_heads, modules_per_layer=2, example_input=torch.zeros(1, 3, 32, 32))
    assert list(model.layers) == ["features.1.0.mlp", "features.1.1.mlp"]


def test_a_tensor_under_two_names_is_refused():
    body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    body[2].weight = body[0].weight
    with pytest.raises(CoupledUnitsError, match=r"'0.weight' and '2.weight' are one tensor"):
        modularize(body, example_input=torch.zeros(1, 6))
    body.append(nn.Linear(2, 4)).append(nn.Linear(4, 2))
    model = modularize(body, example_input=torch.zeros(1, 6), keep_whole=True)
    assert [layer.mixer for layer in model.layers.values()] == ["4"]
