"""Validation worlds: nobody trains on what they are judged on, and no test row is in them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_environment import all_rows, digits, people

from simulations.datasets import LabelledData, int_column
from simulations.environment import Environment, for_validation
from simulations.environment.division import Labels
from simulations.environment.kept_back import validation_rows
from simulations.settings import Settings
from simulations.world import World

seeds = st.integers(0, 2**31 - 1)
counts = st.lists(st.lists(st.integers(8, 40), min_size=3, max_size=3), min_size=3, max_size=4)


def worlds(source: LabelledData, division: str, seed: int) -> tuple[Environment, Environment]:
    """Build the world of a seed, judged on test data, and the one judged on validation data."""
    options = {
        "devices": 3,
        "classes_per_device": 2 if division.endswith("m") else None,
        "alpha": 0.5 if division == "alpha" else None,
        "seed": seed,
        "samples_per_device": (10, 30),
    }
    return Environment(source, **options), Environment(for_validation(source), **options)


@given(
    seed=seeds,
    division=st.sampled_from(["m", "alpha", "even", "people", "people, m", "own test"]),
    counts=counts,
)
def test_what_is_kept_back_is_in_no_training_and_is_no_test_row(
    seed: int, division: str, counts: list
):
    source = digits()
    if division not in ("m", "alpha", "even"):
        tests = [[5, 5, 5]] * len(counts) if division == "own test" else None
        source = people(counts, test_counts=tests)
    judged_on_test, judged_on_validation = worlds(source, division, seed)
    left, kept = validation_rows(Labels.of(source))
    assert len(kept) > 0
    assert len(np.unique(np.concatenate([left, kept]))) == len(left) + len(kept)

    # In rows of the data set's own training data.
    numbers = range(3)
    trained = [left[judged_on_validation.proxy_rows]]
    trained += [
        left[judged_on_validation.device_train_rows(i, phase)] for i in numbers for phase in (0, 1)
    ]
    tested = [
        kept[judged_on_validation.device_test_rows(i, phase)] for i in numbers for phase in (0, 1)
    ]
    tested.append(kept[judged_on_validation.cloud_test_rows])
    assert not np.isin(np.concatenate(tested), np.concatenate(trained)).any()
    assert judged_on_validation.test_pool is not source.test
    if source.test is None:
        reported = np.concatenate(
            [judged_on_test.cloud_test_rows, *map(judged_on_test.device_test_rows, numbers)]
        )
        seen = np.concatenate([*trained, *tested])
        assert not np.isin(reported, seen).any()


@given(counts=counts)
def test_the_last_rows_of_people_are_kept_back_with_a_gap(counts: list):
    source = people(counts)
    labels = Labels.of(source)
    left, kept = validation_rows(labels)
    for person in range(len(counts)):
        for c in range(3):
            own = np.flatnonzero((labels.owner == person) & (labels.train == c))
            mine, held = np.intersect1d(own, left), np.intersect1d(own, kept)
            if len(mine) + len(held) >= 10 and len(held):
                assert mine.max() + 1 < held.min()
            untouched = int(0.3 * len(own))  # what a world is tested on
            assert max([*mine, *held]) < own[len(own) - untouched]


def test_samples_are_those_of_the_training_data():
    kept_back = for_validation(digits())
    assert len(kept_back.train) + len(kept_back.test) == len(digits().train)
    assert np.bincount(int_column(kept_back.test, "label")).min() >= 20
    everything = np.concatenate(
        [kept_back.tensors(rows)[0].numpy() for rows in (kept_back.train, kept_back.test)]
    )
    own = digits().tensors(digits().train)[0].numpy()
    assert np.array_equal(np.sort(everything.sum(axis=(1, 2, 3))), np.sort(own.sum(axis=(1, 2, 3))))


def test_seeds_share_what_is_kept_back_and_a_world_can_be_asked_for_it():
    rows = [validation_rows(Labels.of(digits()))[1] for _ in range(2)]
    assert np.array_equal(*rows)
    world = World(Settings(judged_on="validation"), seed=3)
    assert len(world.environment.test_pool) == len(rows[0])
    assert len(all_rows(world.environment)) == 1 + 2 * 20


DATA_DIR = Path(__file__).parents[2] / "../shared/data"


@pytest.mark.parametrize(
    ("dataset", "file"), [("hapt", "hapt/hapt_features.npz"), ("speech", "fsdd/fsdd.npz")]
)
def test_people_of_real_data_have_enough_to_be_judged_on(dataset: str, file: str):
    if not (DATA_DIR / file).is_file():
        pytest.skip(f"no {dataset} data in {DATA_DIR}")
    world = World(
        Settings.suited(
            dataset=dataset,
            data_dir=str(DATA_DIR),
            devices=6,
            classes_per_device=0,
            judged_on="validation",
        ),
        seed=0,
    )
    assert all(len(world.environment.device_test_rows(i)) > 20 for i in range(6))
