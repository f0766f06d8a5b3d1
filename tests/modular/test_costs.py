import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from eclm_flower.modular import RESOURCES, Cost, modularize, slim_resnet
from eclm_flower.modular.costs import ARRAY_FRAMING_BYTES, MESSAGE_FRAMING_BYTES

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")
MODULES = 4
FAMILIES = ["mlp", "slim resnet", "resnet18", "one module a layer"]


@pytest.fixture(scope="module")
def models(small_mlp):
    image = torch.zeros(1, 3, 16, 16)
    bodies = {
        "mlp": (small_mlp(), torch.zeros(1, 6), MODULES),
        "slim resnet": (slim_resnet(), image, MODULES),
        "resnet18": (resnet18(num_classes=10), image, MODULES),
        "one module a layer": (small_mlp(), torch.zeros(1, 6), 1),
    }
    return {
        name: modularize(body, modules_per_layer=number, example_input=example).eval()
        for name, (body, example, number) in bodies.items()
    }


def measured(sub_model, example_input):
    """Measure a sub-model by really running it: bytes of its arrays, FLOPs, kept activations."""
    arrays = [t for t in sub_model.state_dict().values() if t.is_floating_point()]
    own = {t.untyped_storage().data_ptr() for t in sub_model.state_dict().values()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = sub_model(example_input)
        output.sum().backward()
    parameters = sum(p.nbytes for p in sub_model.parameters())
    state = sum(t.nbytes for t in sub_model.state_dict().values())
    activations = sum(t.untyped_storage().nbytes() for t in kept.values())
    return Cost(
        communication_bytes=MESSAGE_FRAMING_BYTES
        + sum(t.nbytes + ARRAY_FRAMING_BYTES for t in arrays),
        computation_flops=counter.get_total_flops(),
        memory_bytes=state + 2 * parameters + 16 * activations,
    )


def draw_selection(data, model):
    return {
        name: data.draw(st.sets(st.integers(0, layer.modules - 1), min_size=1).map(sorted))
        for name, layer in model.layers.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_add_up_to_what_a_real_sub_model_takes(models, family):
    model = models[family]

    @settings(max_examples=5 if family == "resnet18" else 20, phases=[Phase.generate])
    @given(data=st.data())
    def check(data):
        selection = draw_selection(data, model)
        promised = model.costs.of(selection)
        real = measured(model.sub_model(selection), model.example_input)
        assert promised.communication_bytes == real.communication_bytes
        assert promised.computation_flops == pytest.approx(real.computation_flops, rel=0.02)
        assert promised.memory_bytes == pytest.approx(real.memory_bytes, rel=0.05)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_cost_is_that_of_all_modules(models, family):
    costs, layers = models[family].costs, models[family].layers
    assert costs.modules == {name: layer.modules for name, layer in layers.items()}
    assert costs.whole == costs.of({name: range(n) for name, n in costs.modules.items()})
    real = measured(models[family].body, models[family].example_input)
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
    assert gated.costs.per_module == uniform.costs.per_module
    assert gated.costs.shared == shared + Cost(
        communication_bytes=extra + ARRAY_FRAMING_BYTES * len(arrays),
        computation_flops=0,
        memory_bytes=extra,
    )


def test_costs_add_and_scale():
    cost = Cost(communication_bytes=1, computation_flops=2, memory_bytes=3)
    assert cost + cost * 2 == 3 * cost
    assert cost * 2 == Cost(communication_bytes=2, computation_flops=4, memory_bytes=6)


def test_a_linear_pair_costs_what_arithmetic_says():
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    costs = modularize(body, modules_per_layer=4, example_input=torch.zeros(1, 6)).costs
    (module,) = costs.per_module.values()
    assert module.communication_bytes == 4 * (2 * 6 + 2 + 3 * 2)
    # forward and the gradient of the weights for both, the gradient of the input for the second
    assert module.computation_flops == 2 * (2 * 6) * 2 + 2 * (2 * 3) * 3
    framing = MESSAGE_FRAMING_BYTES + 4 * ARRAY_FRAMING_BYTES
    assert costs.shared.communication_bytes == 4 * 3 + framing
