"""The ceiling test: what it may look at, what it finds, what it says."""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn

import simulations.__main__ as command_line
from simulations import environment
from simulations.ceiling import DEGREES, ROWS, best_degree, between, gain_of, run_ceiling, verdict
from simulations.proxy_parts import split_proxy, sub_tasks_of_devices
from simulations.settings import Settings
from simulations.world import World

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


def of_people(folder: Path, *, alike: bool) -> str:
    """Write data of four people who name three classes alike, or each in another order."""
    rng = np.random.default_rng(0)
    device, kind = np.repeat(np.arange(4), 900), np.tile(np.arange(3), 1200)
    x = (rng.normal(size=(3600, 8)) + 2 * np.eye(8)[kind]).astype(np.float32)
    y = kind if alike else (kind + device) % 3
    np.savez(folder / "people.npz", x=x, y=y, device=device, test=rng.random(3600) < 0.2)
    return str(folder / "people.npz")


def answer(folder: Path, **options: object) -> pd.DataFrame:
    settings = Settings.suited(per_round=1, out=str(folder / "out"), **options)
    return run_ceiling(settings, (0.25,), most_devices=8, console=Console(quiet=True))


def test_there_is_nothing_to_gain_where_people_are_alike(tmp_path: Path):
    frame = answer(tmp_path, dataset=of_people(tmp_path, alike=True), devices=4, epochs=10)
    frame = best_degree(frame)
    gain, half = gain_of(frame["shared_masked"], frame["special_masked"])
    assert abs(gain) < 5
    assert gain - half < 0
    assert frame["shared"].mean() > 0.8
    assert "can gain" not in verdict(frame)


def test_there_is_much_to_gain_where_people_differ(tmp_path: Path):
    frame = answer(tmp_path, dataset=of_people(tmp_path, alike=False), devices=4, epochs=10)
    best = best_degree(frame)
    assert best["special"].min() > 0.7
    assert best["shared"].mean() < 0.6
    assert list(best["sub_tasks"]) == ["0", "1", "2", "3"]
    assert "can gain up to about" in verdict(best)
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "out" / ROWS, dtype={"sub_tasks": str}), frame, check_dtype=False
    )


def test_nobody_looks_at_test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("looked at test data")

    for name in ("cloud_test", "device"):
        monkeypatch.setattr(environment.Environment, name, refuse)
    options = {"feature_shift": "known", "epochs": 1, "enhancing_epochs": 1, "devices": 4}
    frame = answer(tmp_path, dataset="digits", views="plain,negative", **options)
    assert len(frame) == 2 * len(DEGREES)


@pytest.mark.parametrize(
    "options",
    [{"classes_per_device": 2}, {"feature_shift": "known", "views": ("plain", "noise")}],
)
def test_the_held_out_part_is_of_the_same_sub_tasks_and_no_training_sample(options):
    world = World(Settings.suited(devices=5, **options), seed=0)
    train, held_out = split_proxy(world)
    rows = [
        {tuple(x.flatten().tolist()) for x in part.data.tensors[0]} for part in (train, held_out)
    ]
    assert not rows[0] & rows[1]
    counts = [torch.bincount(part.sub_tasks) for part in (train, held_out)]
    shares = counts[1] / (counts[0] + counts[1])
    assert ((shares > 0.15) & (shares < 0.3)).all()


def test_a_part_numbers_its_sub_tasks_anew():
    world = World(Settings.suited(devices=5, classes_per_device=2), seed=0)
    train, _ = split_proxy(world)
    own = train.of((3, 7))
    assert set(own.data.tensors[1].tolist()) == {3, 7}
    assert torch.equal(own.sub_tasks, (own.data.tensors[1] == 7).long())


def test_devices_are_of_their_classes_views_or_persons(tmp_path: Path):
    by_class = World(Settings.suited(devices=5, classes_per_device=2), seed=0)
    assert sub_tasks_of_devices(by_class) == [by_class.data(d, 0).classes for d in range(5)]
    options = {"feature_shift": "known", "views": ("plain", "noise", "blur")}
    by_view = World(Settings.suited(devices=5, **options), seed=0)
    views = [(by_view.environment.view_of(d),) for d in range(5)]
    assert sub_tasks_of_devices(by_view) == views
    assert set(views) == {(0,), (1,), (2,)}
    dataset = of_people(tmp_path, alike=False)
    by_person = World(Settings.suited(dataset=dataset, devices=4, per_round=1), seed=0)
    assert sub_tasks_of_devices(by_person) == [(0,), (1,), (2,), (3,)]


def test_one_degree_is_best_for_all_devices_of_a_budget():
    masked = {0.25: {0.5: [0.6, 0.6], 1.0: [0.9, 0.1]}, 0.5: {0.5: [0.6, 0.6], 1.0: [0.9, 0.5]}}
    rows = [
        {"share": share, "degree": degree, "special_masked": accuracy}
        for share, degrees in masked.items()
        for degree, accuracies in degrees.items()
        for accuracy in accuracies
    ]
    best = best_degree(pd.DataFrame(rows))
    assert best["degree"].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert best["special_masked"].tolist() == [0.6, 0.6, 0.9, 0.5]


def test_between_two_sub_models():
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    kept = one.weight.clone()
    middle = between(one, other, 0.25)
    torch.testing.assert_close(middle.weight, 0.75 * one.weight + 0.25 * other.weight)
    assert torch.equal(one.weight, kept)
    assert torch.equal(between(one, other, 1.0).bias, other.bias)


def test_gains_are_paired_and_have_students_interval():
    before, after = pd.Series([0.5, 0.7, 0.2]), pd.Series([0.52, 0.71, 0.23])
    assert gain_of(before, after) == (pytest.approx(2), pytest.approx(4.303 / math.sqrt(3), 1e-3))
    assert gain_of(before[:1], after[:1]) == (pytest.approx(2), math.inf)


@pytest.mark.parametrize(
    ("masked", "plain", "said"),
    [
        ([3, 4, 5], [3, 4, 5], "can gain up to about 4.0 points (+4.0 ± 2.5 points)."),
        ([0.1, -0.1, 0], [0.1, -0.1, 0], "nothing to gain from specialising (+0.0 ± 0.2 points)."),
        ([-1, 1, 0], [-1, 1, 0], "too few devices or samples to tell (+0.0 ± 2.5 points)"),
        ([-1, 1, 0], [19, 20, 21], "Of the +20.0 over all logits, the rest comes for free"),
    ],
)
def test_the_verdict_is_a_sentence(masked, plain, said):
    shared = np.full(3, 0.5)
    columns = {"shared": shared, "special": shared + np.array(plain) / 100}
    columns |= {"shared_masked": shared, "special_masked": shared + np.array(masked) / 100}
    assert said in verdict(pd.DataFrame(columns))


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> object:
    monkeypatch.setattr(sys, "argv", ["simulations", "ceiling", *options])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    return ended.value.code


def test_the_command(monkeypatch, tmp_path, capsys):
    options = "--devices 3 --epochs 2 --enhancing-epochs 1 --budgets 0.5,0.25 --most-devices 2"
    assert run(monkeypatch, *options.split(), "--out", str(tmp_path)) == 0
    frame = pd.read_csv(tmp_path / ROWS)
    assert frame["share"].unique().tolist() == [0.5, 0.25]
    assert frame.groupby("share")["sub_tasks"].nunique().tolist() == [2, 2]
    assert "At a budget of 50.0%: " in capsys.readouterr().out


@pytest.mark.parametrize("budgets", ["half", "0", "0.5,2", ""])
def test_budgets_that_make_no_sense_end_it_with_a_sentence(budgets, monkeypatch):
    assert "--budgets as shares in (0, 1]" in str(run(monkeypatch, "--budgets", budgets))
