"""Views of data: each does what it says, more the stronger it is, and nothing to who has none."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simulations.datasets import DataError, load_data
from simulations.environment import Environment, FeatureShift
from simulations.environment import views as v
from simulations.environment.views import IMAGE_VIEWS, SIGNAL_VIEWS

SHAPES = {"digits": (1, 8, 8), "photograph": (3, 32, 32), "flat": (1, 5, 12)}
EVERY_VIEW = [(view, shape) for view in IMAGE_VIEWS.values() for shape in SHAPES.values()] + [
    (view, shape) for view in SIGNAL_VIEWS.values() for shape in ((40,), (1, 32, 20))
]


def seen(view: v.View, x: torch.Tensor, strength: int, seed: int = 0) -> torch.Tensor:
    return view(x, strength, torch.Generator().manual_seed(seed))


def samples(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(6, *shape, generator=torch.Generator().manual_seed(seed))


def test_there_are_enough_views():
    assert len(IMAGE_VIEWS) >= 8
    assert len(SIGNAL_VIEWS) >= 4


@pytest.mark.parametrize(("view", "shape"), EVERY_VIEW)
def test_views_are_pure(view: v.View, shape: tuple[int, ...]):
    x = samples(*shape)
    kept = x.clone()
    first, again = (seen(view, x, 3) for _ in range(2))
    assert torch.equal(x, kept)
    assert torch.equal(first, again)
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert first.isfinite().all()


@pytest.mark.parametrize(("view", "shape"), EVERY_VIEW)
def test_the_stronger_the_farther(view: v.View, shape: tuple[int, ...]):
    x = torch.cat([samples(*shape, seed=seed) for seed in range(10)])
    far = [float((seen(view, x, strength) - x).square().mean()) for strength in range(1, 6)]
    if view is v.plain:
        assert far == [0] * 5
    else:
        assert all(distance > 0 for distance in far)
        assert far[4] > far[0]


@pytest.mark.parametrize("shape", SHAPES.values())
def test_one_sample_does_not_change_how_another_looks(shape: tuple[int, ...]):
    x = samples(*shape)
    for view in (v.brightness, v.contrast, v.negative, v.blur, v.pixelate, v.rotation, v.zoom):
        assert torch.allclose(seen(view, x, 4)[2:3], seen(view, x[2:3], 4), atol=1e-6)


def test_the_strongest_negative_is_the_negative():
    x = samples(3, 8, 8)
    low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(seen(v.negative, x, 5), low + high - x)


def test_five_eighteenths_are_a_quarter_turn():
    x = samples(1, 9, 9)
    assert torch.allclose(seen(v.rotation, x, 5), x.rot90(1, (2, 3)), atol=1e-4) or torch.allclose(
        seen(v.rotation, x, 5), x.rot90(-1, (2, 3)), atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rotation+rotation", lambda x: x.rot90(2, (2, 3))),
        ("rotation+rotation+rotation+rotation", lambda x: x),
        ("negative+negative", lambda x: x),
        ("brightness+negative", lambda x: v.negative(x - 2, 5, torch.Generator())),
        ("negative+brightness", lambda x: v.negative(x, 5, torch.Generator()) - 2),
    ],
)
def test_views_go_one_after_another(name: str, expected: Callable[[torch.Tensor], torch.Tensor]):
    x = samples(3, 8, 8)
    view = FeatureShift(known=True, names=("plain", name), strength=5).views(images=True)[1]
    assert torch.allclose(seen(view, x, 5), expected(x), atol=1e-4)


def test_views_one_after_another_draw_on():
    x = torch.zeros(2, 1, 8, 8)
    once, twice = FeatureShift(known=True, names=("noise", "noise+noise")).views(images=True)
    assert not torch.allclose(seen(twice, x, 5), 2 * seen(once, x, 5), atol=0.1)


def test_blur_keeps_the_mean_and_loses_the_detail():
    x = samples(1, 16, 16)
    y = seen(v.blur, x, 3)
    assert y.std() < 0.8 * x.std()
    assert torch.allclose(seen(v.blur, torch.ones(2, 3, 8, 8), 5), torch.ones(2, 3, 8, 8))


def test_occlusion_hides_one_rectangle():
    x = samples(3, 20, 20)
    changed = (seen(v.occlusion, x, 5) != x).any(dim=1)
    assert torch.equal(changed.sum(dim=(1, 2)), torch.full((6,), 12 * 12))
    for sample in changed:
        rows, columns = sample.any(dim=1), sample.any(dim=0)
        assert int(rows.sum()) == int(columns.sum()) == 12


def test_dropped_features_are_always_the_same():
    x = samples(50)
    lost = (seen(v.dropped, x, 5) == 0).all(dim=0)
    assert torch.equal(lost, (seen(v.dropped, samples(50, seed=9), 5, seed=3) == 0).all(dim=0))
    assert 15 <= int(lost.sum()) <= 25
    bands = (seen(v.dropped, samples(1, 32, 8), 5) == 0).all(dim=(0, 1, 3))
    assert 10 <= int(bands.sum()) <= 16


# Feature shift in an environment


def environment(shift: FeatureShift | None, share: float = 1.0, devices: int = 8) -> Environment:
    return Environment(
        load_data("digits"),
        devices=devices,
        classes_per_device=None,
        seed=0,
        shift=share,
        feature_shift=shift,
    )


FOUR = FeatureShift(known=True, names=("plain", "negative", "rotation", "noise"))


def test_groups_of_devices_share_a_view():
    world = environment(FOUR)
    views = [world.view_of(i) for i in range(8)]
    assert sorted(views) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert environment(None).view_of(3) is None


def test_a_device_sees_its_own_samples_in_its_view():
    world, plain = environment(FOUR), environment(None)
    device = [world.view_of(i) for i in range(8)].index(1)  # negative
    for own, other in (
        (world.device(device).train, plain.device(device).train),
        (world.device(device).test, plain.device(device).test),
    ):
        expected = v.negative(other.tensors[0], 3, torch.Generator())
        assert torch.equal(own.tensors[0], expected)
        assert torch.equal(own.tensors[1], other.tensors[1])


def test_known_views_are_in_the_proxy_data_as_sub_tasks():
    world, plain = environment(FOUR), environment(None)
    tasks = world.proxy_sub_tasks
    assert torch.bincount(tasks).min() >= len(tasks) // 4
    x, original = world.proxy().tensors[0], plain.proxy().tensors[0]
    assert torch.equal(x[tasks == 0], original[tasks == 0])
    negative = v.negative(original[tasks == 1], 3, torch.Generator())
    assert torch.equal(x[tasks == 1], negative)
    assert torch.equal(world.proxy().tensors[0], x)


def test_new_views_are_not_in_the_proxy_data():
    world, plain = environment(FeatureShift(known=False)), environment(None)
    assert torch.equal(world.proxy().tensors[0], plain.proxy().tensors[0])
    assert torch.equal(world.proxy_sub_tasks, plain.proxy_sub_tasks)
    assert all(
        not torch.equal(world.device(i).train.tensors[0], plain.device(i).train.tensors[0])
        for i in range(8)
    )


def test_the_cloud_is_tested_in_all_views():
    x = environment(FOUR).cloud_test().tensors[0]
    original = environment(None).cloud_test().tensors[0]
    same = (x == original).flatten(1).all(dim=1)
    assert 0.2 < float(same.float().mean()) < 0.3


@given(share=st.sampled_from([0.0, 0.5, 1.0]))
def test_groups_move_on_together(share: float):
    world = environment(FOUR, share)
    course = np.array([[world.view_of(i, phase) for phase in range(20)] for i in range(8)])
    groups = {int(first): course[course[:, 0] == first] for first in range(4)}
    assert all((group == group[0]).all() for group in groups.values())
    moves = np.mean(course[:, 1:] != course[:, :-1])
    assert moves == share if share in (0, 1) else 0.3 < moves < 0.7


def test_classes_stay_when_views_move():
    world = Environment(
        load_data("digits"), devices=4, classes_per_device=2, seed=0, feature_shift=FOUR
    )
    assert world.device(1, 3).classes == world.device(1, 0).classes


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        (FeatureShift(known=True, names=("plain", "sepia")), "views of images from plain.*sepia"),
        (FeatureShift(known=True, names=("plain", "noise+")), r"views of images.*got noise\+"),
        (FeatureShift(known=True, names=("plain",)), "at least two different views"),
        (FeatureShift(known=True, names=("noise", "noise")), "at least two different views"),
        (FeatureShift(known=True, strength=6), "strength of 1 to 5, got 6"),
    ],
)
def test_bad_views_are_refused(shift: FeatureShift, said: str):
    with pytest.raises(DataError, match=said):
        environment(shift)


def test_signals_have_views_of_their_own():
    with pytest.raises(DataError, match=r"views of signals from plain, gain.*got rotation"):
        FeatureShift(known=True, names=("plain", "rotation")).views(images=False)
    assert len(FeatureShift(known=False).views(images=False)) == len(SIGNAL_VIEWS) - 1
