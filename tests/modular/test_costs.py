import copy
import io

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import (
    ConvNeXt,
    MobileNetV2,
    ResNet,
    SwinTransformer,
    VisionTransformer,
    resnet18,
    vgg11_bn,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck

from eclm_flower.modular import RESOURCES, Cost, CostTable, apply_policy, modularize, slim_resnet
from eclm_flower.modular.cost_measurement import framing_bytes
from eclm_flower.modular.real_device import FLOP_FORMULAS

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")
MODULES = 4
FAMILIES = [
    *("mlp", "gated mlp", "slim resnet", "gated slim resnet", "resnet18", "one module a layer"),
    *("resnext", "mobilenet", "vgg", "vit", "swin", "convnext", "encoder", "partly frozen"),
]


def build(family, small_mlp):
    """Body, example input and modules a layer; small, but with every kind of layer."""
    image = torch.zeros(1, 3, 32, 32)
    torch.manual_seed(0)
    match family.removeprefix("gated "):
        case "mlp":
            return small_mlp(), torch.zeros(1, 6), MODULES
        case "one module a layer":
            return small_mlp(), torch.zeros(1, 6), 1
        case "partly frozen":
            body = small_mlp()
            body[0].requires_grad_(False)
            return body, torch.zeros(1, 6), MODULES
        case "slim resnet":
            return slim_resnet(), image, MODULES
        case "resnet18":
            return resnet18(num_classes=10), image, MODULES
        case "resnext":
            body = ResNet(Bottleneck, [1, 1, 1, 2], num_classes=10, groups=8, width_per_group=4)
            return body, image, MODULES
        case "mobilenet":
            blocks = [[1, 16, 1, 1], [4, 24, 2, 2], [6, 32, 1, 2]]
            return MobileNetV2(10, inverted_residual_setting=blocks), image, MODULES
        case "vgg":
            body = vgg11_bn(num_classes=10)
            body.classifier = nn.Sequential(
                nn.Linear(512 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)
            )
            return body, image, MODULES
        case "vit":
            body = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10, dropout=0.1)
            return body, image, MODULES
        case "swin":
            body = SwinTransformer([4, 4], 32, [2, 1], [4, 8], [4, 4], num_classes=10)
            return body, image, MODULES
        case "convnext":
            body = ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=10)
            return body, image, MODULES
        case "encoder":
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            body = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(320, 3))
            return body, torch.zeros(1, 10, 32), MODULES
    raise KeyError(family)


@pytest.fixture(scope="module")
def models(small_mlp):
    models = {}
    for family in FAMILIES:
        body, example, number = build(family, small_mlp)
        gating = "selector" if family.startswith("gated") else "uniform"
        models[family] = modularize(
            body, modules_per_layer=number, example_input=example, gating=gating, batch_size=8
        )
    return models


def framing(model):
    return framing_bytes(
        layers=len(model.layers),
        arrays=2 + (model.gating == "selector"),  # all of one dtype
        whole_bytes=sum(tensor.nbytes for tensor in model.body.state_dict().values()),
    )


def measured(sub_model, example_input, framing):
    """Measure a sub-model by really running it: bytes of its arrays, FLOPs, kept activations."""
    apply_policy(sub_model, "frozen").train()
    arrays = [t for t in sub_model.state_dict().values() if t.is_floating_point()]
    own = {t.untyped_storage().data_ptr() for t in sub_model.state_dict().values()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.cat([example_input] * 8)
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = sub_model(x)
        forward = counter.get_total_flops()
        output.sum().backward()
    trained = sum(p.nbytes for p in sub_model.parameters() if p.requires_grad)
    state = sum(t.nbytes for t in sub_model.state_dict().values())
    activations = sum(t.untyped_storage().nbytes() for t in kept.values())
    return Cost(
        communication_bytes=framing + sum(t.nbytes for t in arrays),
        computation_flops=counter.get_total_flops() / 8,
        memory_bytes=state + 2 * trained + activations,
        forward_flops=forward / 8,
    )


def draw_selection(data, model):
    return {
        name: data.draw(st.sets(st.integers(0, layer.modules - 1), min_size=1).map(sorted))
        for name, layer in model.layers.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_add_up_to_what_a_real_sub_model_takes(models, family):
    model = models[family]

    @settings(max_examples=20 if "mlp" in family else 4, phases=[Phase.generate])
    @given(data=st.data())
    def check(data):
        selection = draw_selection(data, model)
        promised = model.costs.of(selection)
        real = measured(model.sub_model(selection), model.example_input, framing(model))
        assert promised.communication_bytes == real.communication_bytes
        assert promised.computation_flops == pytest.approx(real.computation_flops, rel=0.02)
        assert promised.forward_flops == pytest.approx(real.forward_flops, rel=0.02)
        assert promised.memory_bytes == pytest.approx(real.memory_bytes, rel=0.05)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_cost_is_that_of_all_modules(models, family):
    costs, layers = models[family].costs, models[family].layers
    assert costs.modules == {name: layer.modules for name, layer in layers.items()}
    assert costs.whole == costs.of({name: range(n) for name, n in costs.modules.items()})
    selection = {name: range(n) for name, n in costs.modules.items()}
    model = models[family]
    real = measured(model.sub_model(selection), model.example_input, framing(model))
    assert costs.whole.communication_bytes == real.communication_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_costs_something_of_every_resource(models, family):
    """So that a sub-model's cost grows with each module."""
    costs = models[family].costs
    for layer in costs.per_module.values():
        assert all(getattr(layer, resource) > 0 for resource in RESOURCES)
    assert all(getattr(costs.shared, resource) >= 0 for resource in RESOURCES)


def test_measuring_changes_nothing(small_mlp):
    model = modularize(small_mlp(), modules_per_layer=MODULES, example_input=torch.zeros(1, 6))
    model.train()
    model.body[1].eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert model.costs is model.costs
    assert [layer for layer in model.body if not layer.training] == [model.body[1]]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_gated_model_pays_for_its_selector(small_mlp):
    uniform, gated = (
        modularize(
            small_mlp(), modules_per_layer=MODULES, example_input=torch.zeros(1, 6), gating=gating
        )
        for gating in ("uniform", "selector")
    )
    arrays = list(gated.selector.state_dict().values())
    extra = sum(t.nbytes for t in arrays)
    shared = uniform.costs.shared
    assert gated.costs.shared.communication_bytes == shared.communication_bytes + extra + framing(
        gated
    ) - framing(uniform)
    forward = sum(2 * p.numel() for p in gated.selector.parameters() if p.ndim == 2)
    assert gated.costs.shared.forward_flops == shared.forward_flops + forward
    assert gated.costs.shared.computation_flops == shared.computation_flops + forward  # frozen
    assert gated.costs.shared.memory_bytes >= shared.memory_bytes + extra
    for name, cost in gated.costs.per_module.items():
        assert cost.memory_bytes > uniform.costs.per_module[name].memory_bytes  # scaled copies


def test_what_is_frozen_has_no_gradient_to_pay_for(small_mlp):
    free = modularize(small_mlp(), modules_per_layer=MODULES, example_input=torch.zeros(1, 6))
    body = small_mlp()
    body[0].requires_grad_(False)
    frozen = modularize(body, modules_per_layer=MODULES, example_input=torch.zeros(1, 6))
    least = 2 * sum(p.nbytes for p in body[0].parameters())  # gradient and momentum
    assert free.costs.whole.memory_bytes - frozen.costs.whole.memory_bytes >= least


def test_layers_that_only_look_alike_are_priced_apart():
    """The first layer's input needs no gradient, the second's does."""
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    body = nn.Sequential(*layers, *copy.deepcopy(layers))
    costs = modularize(body, modules_per_layer=4, example_input=torch.zeros(1, 8)).costs
    first, second = costs.per_module.values()
    assert first.communication_bytes == second.communication_bytes == 4 * (2 * 8 + 2 + 8 * 2)
    assert second.computation_flops - first.computation_flops == 2 * 8 * 2


@pytest.mark.parametrize("groups", [2, 6])
def test_a_grouped_convolution_costs_what_its_groups_cost_alone(groups):
    """Torch's counter takes the gradient of its weight for a dense one's."""

    def flops(layer, x):
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            layer(x.requires_grad_()).sum().backward()
        return counter.get_total_flops()

    grouped = nn.Conv2d(6, 12, 3, groups=groups)
    alone = nn.Conv2d(6 // groups, 12 // groups, 3)
    with FlopCounterMode(display=False) as counter:
        alone(torch.zeros(2, 6 // groups, 5, 5).requires_grad_()).sum().backward()
    assert flops(grouped, torch.zeros(2, 6, 5, 5)) == groups * counter.get_total_flops()


def test_memory_grows_with_the_batch(small_mlp):
    table = {
        batch: modularize(
            small_mlp(), modules_per_layer=4, example_input=torch.zeros(1, 6), batch_size=batch
        ).costs
        for batch in (1, 2, 3)
    }
    one, two, three = (table[batch].whole for batch in (1, 2, 3))
    assert three.memory_bytes - two.memory_bytes == two.memory_bytes - one.memory_bytes > 0
    assert one.computation_flops == three.computation_flops
    assert table[3].batch_size == 3


def test_the_table_prints_what_each_part_costs():
    cost = Cost(communication_bytes=2e6, computation_flops=3e6, memory_bytes=4e6, forward_flops=1e6)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(CostTable(cost, {"layer1.0": cost * 0.5}, {"layer1.0": 4}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[1] == ["layer1.0", "4", "1.000", "0.500", "1.500", "2.000"]
    assert lines[2] == ["shared", "part", "2.000", "1.000", "3.000", "4.000"]
    assert lines[3] == ["whole", "model", "6.000", "3.000", "9.000", "12.000"]


def test_costs_add_and_scale():
    cost = Cost(communication_bytes=1, computation_flops=2, memory_bytes=3)
    assert cost + cost * 2 == cost * 3
    assert cost * 2 == Cost(communication_bytes=2, computation_flops=4, memory_bytes=6)


def test_a_linear_pair_costs_what_arithmetic_says():
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = modularize(body, modules_per_layer=4, example_input=torch.zeros(1, 6))
    costs = model.costs
    (module,) = costs.per_module.values()
    assert module.communication_bytes == 4 * (2 * 6 + 2 + 3 * 2)
    # forward and the gradient of the weights for both, the gradient of the input for the second
    assert module.computation_flops == 2 * (2 * 6) * 2 + 2 * (2 * 3) * 3
    assert costs.shared.communication_bytes == 4 * 3 + framing(model)
