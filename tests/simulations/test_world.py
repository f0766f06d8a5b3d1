from pathlib import Path

import pytest
import torch

from eclm_flower.adaptation import derive
from simulations.augmentation import flip_and_crop
from simulations.client_app import _Task
from simulations.models import MODELS, build_model
from simulations.settings import Settings, SettingsError
from simulations.world import World, usual_shares
from strategies import METHODS


@pytest.mark.parametrize("name", MODELS)
def test_every_model_maps_its_data_to_classes(name):
    model = build_model(name, (3, 16, 16), 7, seed=0)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_auto_takes_a_perceptron_for_vectors_and_tiny_images():
    assert type(build_model("auto", (415,), 6, seed=0)).__name__ == "Sequential"
    assert type(build_model("auto", (1, 8, 8), 6, seed=0)).__name__ == "Sequential"
    assert type(build_model("auto", (3, 32, 32), 6, seed=0)).__name__ == "SlimResNet"


def test_weights_follow_from_the_seed_alone():
    first = build_model("mlp", (5,), 3, seed=1)[1].weight
    torch.rand(3)
    assert torch.equal(first, build_model("mlp", (5,), 3, seed=1)[1].weight)
    assert not torch.equal(first, build_model("mlp", (5,), 3, seed=2)[1].weight)


def test_bad_models_are_refused_with_a_sentence():
    with pytest.raises(SettingsError, match="--model from auto, mlp"):
        build_model("resnet", (3, 8, 8), 2, seed=0)
    with pytest.raises(SettingsError, match="use --model mlp"):
        build_model("slim-resnet", (415,), 2, seed=0)


def test_every_device_can_afford_some_sub_model():
    world = World(Settings(devices=50, per_round=5), seed=0)
    importance = world.model.importance([torch.zeros(1, *world.environment.input_shape)])
    for device in range(50):
        for moment in (0, 7):
            budget = world.budget(device, moment)
            selection = derive(importance, world.model.costs, budget)
            assert budget.allows(world.model.costs.of(selection))


def test_budgets_follow_the_fleet_and_the_moment():
    def budgets(fleet: str, moment: int) -> list:
        world = World(Settings(devices=20, fleet=fleet), seed=0)
        return [world.budget(device, moment) for device in range(20)]

    assert budgets("phones", 0) == budgets("phones", 0)
    assert budgets("phones", 0) != budgets("phones", 9)
    assert budgets("uniform:0.5", 0) == budgets("uniform:0.5", 9)
    assert len(set(budgets("uniform:0.5", 0))) == 1


@pytest.mark.parametrize(("fleet", "least", "most"), [("phones", 0.1, 0.6), ("boards", 0.1, 0.34)])
def test_the_cloud_expects_devices_like_the_simulated(fleet, least, most):
    shares = usual_shares(fleet)
    assert list(shares) == sorted(shares)
    assert least <= shares[0] <= shares[-1] <= most
    assert usual_shares("uniform:0.25") == (0.25,) * 5


def test_data_moves_with_the_steps():
    world = World(Settings(steps=4, shift_every=2), seed=0)
    assert world.data(3, 0) is world.data(3, 1)
    assert world.data(3, 1).classes != world.data(3, 2).classes


@pytest.mark.parametrize("options", [{}, {"feature_shift": "new", "views": ("noise", "blur")}])
def test_sub_tasks_that_are_classes_get_no_delta_modules(options):
    world = World(Settings(**options), seed=0)
    assert world.environment.sub_tasks_are_classes
    assert world.sub_tasks == 0


def test_environments_get_delta_modules():
    world = World(Settings(feature_shift="known", views=("plain", "noise")), seed=0)
    assert world.sub_tasks == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"classes_per_device": 0, "alpha": 0.5}, True),
        ({"classes_per_device": 0}, False),
    ],
)
def test_label_skew_is_what_the_division_says(options, expected):
    assert World(Settings(**options), seed=0).has_label_skew is expected


def task_of(world: World, method: str, folder: Path) -> _Task:
    return _Task(
        world=world,
        method=METHODS[method],
        device=3,
        step=0,
        moment=2,
        local=True,
        keeps=False,
        delivery=True,
        folder=folder,
    )


def test_any_seed_will_do(tmp_path):
    task = task_of(World(Settings(), seed=2**40), "eclm", tmp_path)
    first, again, other = (task.generator(purpose).initial_seed() for purpose in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "method", "expected"),
    [
        ({}, "eclm", True),
        ({}, "eclm-no-prior", False),
        ({}, "clusters", False),
        ({"class_prior": True}, "clusters", True),
        ({"classes_per_device": 0}, "eclm", False),
        ({"classes_per_device": 0, "class_prior": True}, "eclm", True),
    ],
)
def test_each_network_a_device_can_use_knows_its_classes(tmp_path, options, method, expected):
    task = task_of(World(Settings(**options), seed=0), method, tmp_path)
    candidates = torch.nn.ModuleList(torch.nn.Linear(2, 10) for _ in range(2))
    before = [network.bias.clone() for network in candidates]
    with task.prior(candidates):
        told = [
            not torch.equal(network.bias, bias)
            for network, bias in zip(candidates, before, strict=True)
        ]
    assert told == [expected, expected]


@pytest.mark.parametrize(("side", "most"), [(16, 2), (32, 4)])
def test_photographs_are_shifted_by_at_most_an_eighth_and_flipped_whole(side, most):
    x = torch.zeros(400, 3, side, side)
    x[:, :, 8, 5] = torch.tensor([1.0, 2.0, 3.0])
    y = flip_and_crop(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    spots = (y[:, 2] == 3).nonzero()
    assert len(spots) == 400  # none is lost, none is doubled
    assert torch.equal((y[:, 0] == 1).nonzero(), spots)  # channels move together
    columns = set(spots[:, 2].tolist())
    shifts = range(-most, most + 1)
    assert columns == {5 + shift for shift in shifts} | {side - 6 + shift for shift in shifts}
    assert set(spots[:, 1].tolist()) == {8 + shift for shift in shifts}
