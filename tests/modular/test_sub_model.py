"""Invariant 2: a sub-model computes what the cloud model does with its gates restricted to it."""

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torchvision.models import resnet18

from eclm_flower.errors import SelectionError
from eclm_flower.modular import ModularModel, modularize, slim_resnet
from eclm_flower.modular.selection import checked, count

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")
MODULES = 4
SELECTION = {"0": [0, 2], "1": [3]}


@pytest.fixture(scope="module")
def models(perturb, small_mlp):
    """Cloud models by family, and a batch for each."""
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 16, 16)
    bodies = {
        "mlp": (small_mlp(), torch.zeros(1, 6)),
        "slim resnet": (perturb(slim_resnet()), image),
        "resnet18": (perturb(resnet18(num_classes=10)), image),
    }
    return {
        name: (
            modularize(body, modules_per_layer=MODULES, example_input=example).eval(),
            torch.randn(3, *example.shape[1:]),
        )
        for name, (body, example) in bodies.items()
    }


@pytest.fixture(scope="module")
def gated(perturb, small_mlp):
    """Build an MLP whose trained-like selector gates it."""

    def gated(top_k=None) -> ModularModel:
        torch.manual_seed(0)
        model = modularize(
            small_mlp(),
            modules_per_layer=MODULES,
            example_input=torch.zeros(1, 6),
            gating="selector",
            top_k=top_k,
        )
        perturb(model.selector)
        with torch.no_grad():
            model.selector.heads.weight.mul_(10)  # gates far from equal
        return model.eval()

    return gated


def draw_selection(data, model):
    some = st.sets(st.integers(0, MODULES - 1), min_size=1).map(sorted)
    return data.draw(st.fixed_dictionaries(dict.fromkeys(model.layers, some)))


def gates_of(selection):
    """Gates that are 1 for the chosen modules and 0 for the others."""
    return {
        name: torch.zeros(1, MODULES).index_fill(1, torch.tensor(numbers), 1.0)
        for name, numbers in selection.items()
    }


@pytest.mark.parametrize("family", ["mlp", "slim resnet", "resnet18"])
def test_a_sub_model_is_the_cloud_model_with_the_other_gates_at_0(models, family):
    model, x = models[family]

    @settings(max_examples=100 if family == "mlp" else 15, phases=[Phase.generate])
    @given(data=st.data())
    @torch.no_grad()
    def check(data):
        selection = draw_selection(data, model)
        sub_model = model.sub_model(selection)
        assert type(sub_model) is type(model.body)
        torch.testing.assert_close(
            sub_model(x), model.forward_gated(x, gates_of(selection)), rtol=1e-4, atol=1e-5
        )

    check()


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_gated_sub_model_is_the_cloud_model_with_its_scores_restricted(gated, top_k):
    model = gated(top_k)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))

    @given(data=st.data())
    @torch.no_grad()
    def check(data):
        selection = draw_selection(data, model)
        gates = {}
        for name, logits in model.selector(x).items():
            restricted = torch.full_like(logits, -torch.inf)
            restricted[:, selection[name]] = logits[:, selection[name]]
            used = min(top_k or MODULES, len(selection[name]))
            least = restricted.topk(used, dim=1).values[:, -1:]
            restricted = restricted.masked_fill(restricted < least, -torch.inf)
            gates[name] = used * restricted.softmax(dim=1)
        expected = model.forward_gated(x, gates)
        torch.testing.assert_close(model.sub_model(selection)(x), expected, rtol=1e-4, atol=1e-5)

    check()


@given(seed=st.integers(0, 2**31))
@torch.no_grad()
def test_gates_weigh_each_module_for_each_sample(models, seed):
    """The paper's sum over modules, by a slow loop over samples and modules of one layer."""
    model, x = models["mlp"]
    gates = torch.rand(len(x), MODULES, generator=torch.Generator().manual_seed(seed))
    body = model.body
    hidden = body[2](body[1](body[0](x)))
    mixed = body[3].bias.repeat(len(x), 1)
    for sample in range(len(x)):
        for module in range(MODULES):
            units = slice(2 * module, 2 * module + 2)
            mixed[sample] += (
                gates[sample, module] * body[3].weight[:, units] @ hidden[sample, units]
            )
    torch.testing.assert_close(model.forward_gated(x, {"0": gates}), body[4:](mixed))


def test_gating_leaves_no_trace(models):
    model, x = models["mlp"]
    before = model(x)
    model.forward_gated(x, gates_of(SELECTION))
    assert torch.equal(model(x), before)


def test_a_sub_model_is_narrow_and_says_so(models):
    sub_model = models["mlp"][0].sub_model(SELECTION)
    assert [tuple(p.shape) for p in sub_model.parameters()] == [
        *[(4, 6), (4,), (4,), (4,)],
        *[(12, 4), (12,)],
        *[(2, 12), (2,)],
        *[(3, 2), (3,)],
    ]
    assert (sub_model[0].out_features, sub_model[3].in_features) == (4, 4)
    assert (sub_model[3].out_features, sub_model[5].out_features) == (12, 2)
    assert sub_model[1].num_features == 4
    assert tuple(sub_model[1].running_var.shape) == (4,)

    model = models["resnet18"][0]
    selection = dict.fromkeys(model.layers, (1, 3, 0))
    block = model.sub_model(selection).layer1[0]
    assert (block.conv1.in_channels, block.conv1.out_channels) == (64, 48)
    assert (block.conv2.in_channels, block.conv2.out_channels) == (48, 64)
    assert (block.bn1.num_features, block.bn2.num_features) == (48, 64)


def storages(model):
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}


@pytest.mark.parametrize("chosen", [[1], range(MODULES)])
@pytest.mark.parametrize("family", ["mlp", "slim resnet"])
def test_a_sub_model_has_tensors_of_its_own(models, family, chosen):
    model, x = models[family]
    before = copy.deepcopy(model.state_dict())
    sub_model = model.sub_model(dict.fromkeys(model.layers, chosen))
    assert not storages(model) & storages(sub_model)
    optimizer = torch.optim.SGD(sub_model.parameters(), lr=1.0)
    sub_model.train()(x).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_gated_sub_model_has_a_selector_of_its_own(gated):
    model = gated()
    sub_model = model.sub_model(SELECTION)
    assert sub_model.selection == {"0": (0, 2), "1": (3,)}
    assert not storages(model) & storages(sub_model)


def test_a_sub_model_keeps_what_is_frozen(small_mlp):
    body = small_mlp()
    body[0].weight.requires_grad_(False)
    model = modularize(body, modules_per_layer=MODULES, example_input=torch.zeros(1, 6))
    sub_model = model.sub_model(SELECTION)
    assert not sub_model[0].weight.requires_grad
    assert sub_model[3].weight.requires_grad


@torch.no_grad()
def test_the_narrowed_state_is_the_sub_models(models):
    model, _ = models["mlp"]
    state = model.sub_model(SELECTION).state_dict()
    narrowed = model.narrowed_state({"0": (0, 2), "1": (3,)})
    assert set(narrowed) == set(state)
    assert all(torch.equal(tensor, narrowed[key]) for key, tensor in state.items())


def test_gradients_reach_the_chosen_modules_only(perturb):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model = modularize(body, modules_per_layer=MODULES, example_input=torch.zeros(1, 6))
    state = model.narrowed_state({"0": (1, 2)})
    functional_call(body, state, (torch.randn(5, 6),)).square().sum().backward()
    layer = model.layers["0"]
    for key in layer.axes:
        reached = layer.packed(key, body.get_parameter(key).grad).flatten(1).norm(dim=1) > 0
        assert reached.tolist() == [False, True, True, False]
    assert body[2].bias.grad.abs().min() > 0


def test_modules_tile_a_tensor_without_overlap(small_mlp):
    """Writing each module's number into it, every sub-model of one module reads only its own."""
    model = modularize(small_mlp(), modules_per_layer=MODULES, example_input=torch.zeros(1, 6))
    state = model.body.state_dict()
    with torch.no_grad():
        for layer in model.layers.values():
            for key in layer.axes:
                for module in range(MODULES):
                    layer.packed(key, state[key])[module] = module
    for module in range(MODULES):
        own = model.sub_model({name: [module] for name in model.layers}).state_dict()
        for layer in model.layers.values():
            assert all((own[key] == module).all() for key in layer.axes)


@pytest.mark.parametrize(
    ("selection", "problem"),
    [
        ({"0": [0]}, "at least one module in layer '1'"),
        ({"0": [0], "1": []}, "at least one module in layer '1'"),
        ({"0": [0], "1": [0], "fc": [0]}, r"unknown \['fc'\]"),
        ({"0": [0], "1": [4]}, "modules 0 to 3 in layer '1'"),
        ({"0": [-1], "1": [0]}, "modules 0 to 3 in layer '0'"),
        ({"0": [1, 1], "1": [0]}, "names a module twice"),
    ],
)
def test_a_bad_selection_is_refused(models, selection, problem):
    with pytest.raises(SelectionError, match=problem):
        models["mlp"][0].sub_model(selection)


def test_a_selection_is_put_in_order_and_counted(models):
    selection = checked({"1": (3, 0), "0": [2]}, {"0": 4, "1": 4})
    assert selection == {"0": (2,), "1": (0, 3)}
    assert count(selection) == 3


def test_hooks_of_one_model_are_not_those_of_another(small_mlp):
    example = torch.zeros(1, 6)
    model = modularize(small_mlp(), modules_per_layer=4, example_input=example).eval()
    chosen = dict.fromkeys(model.layers, (0,))
    one, other = model.sub_model(chosen), model.sub_model(chosen)
    called = []
    for part in one.modules():
        part.register_forward_hook(lambda *_: called.append("one"))
        part.register_full_backward_hook(lambda *_: called.append("one"))
    x = torch.randn(2, 6)
    other(x).sum().backward()
    model(x).sum().backward()
    model.sub_model(chosen)(x)
    assert not called
    one(x)
    assert called
