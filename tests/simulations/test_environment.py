"""Who sees which data: nothing is shared that may not be, and a seed decides everything."""

import os
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.datasets import DataError, LabelledData, int_column, load_data
from simulations.environment import Environment

DATA_DIR = Path(os.environ.get("ECLM_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))
seeds = st.integers(0, 2**31 - 1)


@cache
def digits() -> LabelledData:
    return load_data("digits")


def label_skew(devices: int = 20, m: int = 2, seed: int = 0, **more: object) -> Environment:
    return Environment(digits(), devices=devices, classes_per_device=m, seed=seed, **more)


def people(counts: list[list[int]], test_counts: list[list[int]] | None = None) -> LabelledData:
    """Data of one person for each row of counts, counts[person][class] samples, x = row number."""

    features = datasets.Features(
        x=datasets.List(datasets.Value("float32"), length=1),
        label=datasets.Value("int64"),
        device=datasets.Value("int64"),
    )

    def rows(table: list[list[int]]) -> datasets.Dataset:
        device = [p for p, row in enumerate(table) for _ in range(sum(row))]
        label = [c for row in table for c, count in enumerate(row) for _ in range(count)]
        columns = {"x": [[float(i)] for i in range(len(label))], "label": label, "device": device}
        return datasets.Dataset.from_dict(columns, features=features)

    return LabelledData(
        name="people",
        train=rows(counts),
        test=None if test_counts is None else rows(test_counts),
        num_classes=len(counts[0]),
        input_shape=(1,),
        images=False,
    )


def all_rows(environment: Environment) -> list[np.ndarray]:
    numbers = range(environment.num_devices)
    return [
        environment.proxy_rows,
        *(environment.device_train_rows(i) for i in numbers),
        *(environment.device_test_rows(i) for i in numbers),
    ]


def check_train_rows_are_nobody_elses(environment: Environment) -> None:
    mine = [environment.device_train_rows(i) for i in range(environment.num_devices)]
    taken = np.concatenate([environment.proxy_rows, *mine])
    assert len(np.unique(taken)) == len(taken)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, devices=st.integers(1, 30), m=st.integers(1, 5))
def test_label_skew(seed: int, devices: int, m: int):
    environment = label_skew(devices, m, seed, samples_per_device=(20, 60), test_samples=40)
    check_train_rows_are_nobody_elses(environment)
    assert len(environment.proxy_rows) == round(0.3 * 1438)
    labels, test_labels = int_column(digits().train, "label"), int_column(digits().test, "label")
    for number in range(devices):
        train, test = environment.device_train_rows(number), environment.device_test_rows(number)
        counts = np.bincount(labels[train], minlength=10)
        assert (counts > 0).sum() == m
        assert counts[counts > 0].min() >= 2
        assert len(train) <= 60
        assert 1 <= len(test) <= 40
        assert len(np.unique(test)) == len(test)
        assert set(test_labels[test]) <= set(labels[train])
        # In the proportion of the training classes, up to rounding.
        share = np.bincount(test_labels[test], minlength=10) - len(test) * counts / counts.sum()
        assert np.abs(share).max() <= 1


@settings(max_examples=15, deadline=None)
@given(seed=seeds, devices=st.integers(1, 20))
def test_even(seed: int, devices: int):
    environment = Environment(digits(), devices=devices, classes_per_device=None, seed=seed)
    check_train_rows_are_nobody_elses(environment)
    sizes = [len(environment.device_train_rows(i)) for i in range(devices)]
    assert min(sizes) >= 50
    assert max(sizes) <= 150
    assert len(environment.device(0).classes) >= 8


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    counts=st.lists(st.lists(st.integers(4, 40), min_size=3, max_size=3), min_size=2, max_size=5),
    data=st.data(),
)
def test_natural(seed: int, counts: list[list[int]], data: st.DataObject):
    devices = data.draw(st.integers(1, len(counts)))
    source = people(counts)
    environment = Environment(source, devices=devices, classes_per_device=None, seed=seed)
    everything = np.concatenate(all_rows(environment))
    assert len(np.unique(everything)) == len(everything)

    owner, labels = int_column(source.train, "device"), int_column(source.train, "label")
    tasks = environment.proxy_sub_tasks.numpy()
    owners = []
    for number in range(devices):
        proxy = environment.proxy_rows[tasks == number]
        train, test = environment.device_train_rows(number), environment.device_test_rows(number)
        (person,) = np.unique(owner[np.concatenate([proxy, train, test])])
        owners.append(person)
        assert len(train) <= 150
        for c in range(3):
            groups = [rows[labels[rows] == c] for rows in (proxy, train, test)]
            share = int(0.3 * counts[person][c])
            assert (len(groups[0]), len(groups[2])) == (share, share)
            # In the order of time, with a row between where windows would overlap.
            gap = 1 if counts[person][c] >= 10 else 0
            if len(groups[1]):
                assert groups[0].max() + gap < groups[1].min()
                assert groups[1].max() + gap < groups[2].min()
    assert len(set(owners)) == devices


def test_natural_with_test_rows_of_its_own():
    source = people([[20, 20], [30, 10]], test_counts=[[5, 0], [3, 4]])
    environment = Environment(source, devices=2, classes_per_device=None, seed=0)
    check_train_rows_are_nobody_elses(environment)
    assert environment.test_pool is source.test
    assert environment.device_test_rows(0).tolist() == [0, 1, 2, 3, 4]
    assert environment.device_test_rows(1).tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert len(environment.cloud_test()) == 12
    # 20 rows of a class: 6 for the cloud, one left out, 13 to train on.
    assert environment.device_train_rows(0).tolist() == [*range(7, 20), *range(27, 40)]


def test_label_skew_wins_over_people_and_keeps_their_last_rows_for_test():
    source = people([[40, 40, 40]] * 4)
    environment = Environment(source, devices=6, classes_per_device=2, seed=0)
    check_train_rows_are_nobody_elses(environment)
    assert environment.test_pool is source.train
    last = [row for row in range(480) if row % 40 >= 28]
    assert environment.cloud_test_rows.tolist() == last
    taken = np.concatenate(all_rows(environment)[:7])
    assert not np.isin(taken, [*last, *(row for row in range(480) if row % 40 == 27)]).any()
    assert all(len(environment.device(i).classes) == 2 for i in range(6))


def test_sub_tasks_are_labels_under_label_skew():
    environment = label_skew()
    _, y = environment.proxy().tensors
    assert environment.proxy_sub_tasks.dtype == torch.int64
    assert torch.equal(environment.proxy_sub_tasks, y)


def test_sub_tasks_are_classes_where_the_cloud_lacks_the_first_class():
    lacking = people([[0, 40, 40]])
    skewed = Environment(lacking, devices=2, classes_per_device=1, seed=0)
    assert skewed.proxy_sub_tasks.unique().tolist() == [0, 1]
    assert skewed.proxy().tensors[1].unique().tolist() == [1, 2]
    assert skewed.sub_tasks_are_classes
    own = Environment(people([[0, 40, 40]] * 2), devices=2, classes_per_device=None, seed=0)
    assert not own.sub_tasks_are_classes


def test_sub_tasks_are_labels_when_there_are_too_many_people():
    few = Environment(people([[12, 12]] * 64), devices=64, classes_per_device=None, seed=0)
    many = Environment(people([[12, 12]] * 65), devices=65, classes_per_device=None, seed=0)
    assert few.proxy_sub_tasks.unique().tolist() == list(range(64))
    assert torch.equal(many.proxy_sub_tasks, many.proxy().tensors[1])


@pytest.mark.parametrize("m", [2, None])
def test_the_seed_decides(m: int | None):
    first, again, other = (
        Environment(digits(), devices=10, classes_per_device=m, seed=seed) for seed in (3, 3, 4)
    )
    for mine, same, different in zip(*map(all_rows, (first, again, other)), strict=True):
        assert np.array_equal(mine, same)
        assert not np.array_equal(mine, different)


def test_nothing_depends_on_global_randomness():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = all_rows(label_skew())
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())
    np.random.seed(1)
    assert all(map(np.array_equal, first, all_rows(label_skew())))


def test_sizes_are_spread_over_the_range():
    environment = label_skew(8, 2, samples_per_device=(10, 40))
    sizes = [len(environment.device_train_rows(i)) for i in range(8)]
    assert min(sizes) >= 10
    assert max(sizes) <= 40
    assert len(set(sizes)) > 3
    exact = label_skew(8, 2, samples_per_device=(30, 30))
    assert {len(exact.device_train_rows(i)) for i in range(8)} == {30}


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_a_rare_class_survives_the_cut(seed: int):
    source, size = people([[400, 16]]), (20, 20)
    environment = Environment(
        source, devices=1, classes_per_device=2, seed=seed, samples_per_device=size
    )
    rows = environment.device_train_rows(0)
    assert np.bincount(int_column(source.train, "label")[rows]).min() >= 2
    assert len(rows) == 20


def test_every_class_has_a_device_where_there_are_enough_devices():
    environment = label_skew(10, 1)
    assert sorted(environment.device(i).classes[0] for i in range(10)) == list(range(10))


def test_a_device_holds_the_samples_of_its_rows():
    environment = label_skew()
    device = environment.device(5)
    for rows, pool, held in (
        (environment.device_train_rows(5), digits().train, device.train),
        (environment.device_test_rows(5), digits().test, device.test),
    ):
        x, y = digits().tensors(pool)
        assert torch.equal(held.tensors[0], x[rows])
        assert torch.equal(held.tensors[1], y[rows])
    assert device.classes == tuple(device.train.tensors[1].unique().tolist())
    assert environment.device(5) is device


def test_only_a_few_devices_are_kept_decoded():
    environment = label_skew(40, 2)
    first = environment.device(0)
    for number in range(1, 40):
        environment.device(number)
    assert environment.device(0) is not first
    assert torch.equal(environment.device(0).train.tensors[0], first.train.tensors[0])


def test_the_cloud_is_tested_on_the_whole_pool():
    environment = label_skew()
    assert len(environment.cloud_test()) == 359
    assert (environment.num_devices, environment.num_classes) == (20, 10)
    assert environment.input_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"devices": 0}, "`devices` of at least 1, got 0"),
        ({"classes_per_device": 0}, "1 to 10, got 0"),
        ({"classes_per_device": 11}, "1 to 10, got 11"),
        ({"seed": -1}, "`seed`"),
        ({"proxy_share": 0.0}, "`proxy_share`"),
        ({"proxy_share": 0.9}, "`proxy_share`"),
        ({"samples_per_device": (9, 8)}, "`samples_per_device`"),
        ({"test_samples": 0}, "`test_samples`"),
        ({"devices": 400}, "reduce the devices"),
        ({"devices": 4000}, "reduce the devices"),
        ({"devices": 4000, "classes_per_device": None}, "reduce the devices"),
    ],
)
def test_bad_numbers_are_refused(changes: dict, said: str):
    with pytest.raises(DataError, match=said):
        Environment(digits(), **{"devices": 20, "classes_per_device": 2, "seed": 0, **changes})


def test_natural_refusals():
    with pytest.raises(DataError, match="at most 2, got 3"):
        Environment(people([[20, 20]] * 2), devices=3, classes_per_device=None, seed=0)
    with pytest.raises(DataError, match="1 of the column `device`"):
        Environment(people([[20, 20], [2, 1]]), devices=2, classes_per_device=None, seed=0)
    only_test = people([[20, 20], [20, 20]], test_counts=[[5, 5], [0, 0], [5, 5]])
    with pytest.raises(DataError, match="26 and 0 for number 1"):
        Environment(only_test, devices=3, classes_per_device=None, seed=0)


@pytest.mark.parametrize("number", [-1, 20])
def test_there_is_no_such_device(number: int):
    with pytest.raises(DataError, match="0 to 19"):
        label_skew().device(number)


@pytest.mark.skipif(
    not (DATA_DIR / "hapt/hapt_features.npz").is_file(), reason=f"no HAPT data in {DATA_DIR}"
)
def test_hapt_has_one_device_a_person():
    source = load_data("hapt", DATA_DIR)
    environment = Environment(source, devices=30, classes_per_device=None, seed=0)
    everything = np.concatenate(all_rows(environment))
    assert len(np.unique(everything)) == len(everything)
    owner = int_column(source.train, "device")
    for number in range(30):
        train = environment.device_train_rows(number)
        assert set(owner[train]) == {number}
        assert 50 <= len(train) <= 150
        assert len(environment.device_test_rows(number)) > 80
    assert environment.device(7).classes == (0, 1, 2, 3, 4, 5)
    assert environment.proxy_sub_tasks.unique().tolist() == list(range(30))


@pytest.mark.skipif(
    not (DATA_DIR / "cifar10/train-00000-of-00001.parquet").is_file(),
    reason=f"no CIFAR-10 data in {DATA_DIR}",
)
def test_dividing_photographs_decodes_none_until_a_device_asks(monkeypatch: pytest.MonkeyPatch):
    decoded = []
    decode = datasets.Image.decode_example

    def count(self: datasets.Image, value: dict, **more: object) -> object:
        decoded.append(value)
        return decode(self, value, **more)

    monkeypatch.setattr(datasets.Image, "decode_example", count)
    source = load_data("cifar10", DATA_DIR)
    environment = Environment(source, devices=100, classes_per_device=2, seed=0, test_samples=50)
    assert len(decoded) == 0
    device = environment.device(3)
    assert device.train.tensors[0].shape[1:] == (3, 32, 32)
    assert len(decoded) == len(device.train) + len(device.test) == len(device.train) + 50


# Later phases


def alpha_skew(devices: int = 12, alpha: float = 0.5, seed: int = 0, **more: object) -> Environment:
    return Environment(
        digits(), devices=devices, classes_per_device=None, alpha=alpha, seed=seed, **more
    )


def check_test_rows_are_nobodys_training_rows(environment: Environment, phases: int) -> None:
    """Test rows are disjoint from all training rows of all devices and phases and the cloud."""
    numbers = range(environment.num_devices)
    trained = [environment.proxy_rows] + [
        environment.device_train_rows(i, phase) for i in numbers for phase in range(phases)
    ]
    device_rows = np.concatenate(trained[1:])
    assert not np.isin(device_rows, environment.proxy_rows).any()
    tested = np.concatenate(
        [environment.device_test_rows(i, phase) for i in numbers for phase in range(phases)]
    )
    if environment.test_pool is environment._data.train:
        assert not np.isin(tested, np.concatenate(trained)).any()
    else:
        assert environment.test_pool is environment._data.test


@settings(max_examples=12)
@given(
    seed=seeds,
    shift=st.sampled_from([0.2, 0.5, 1.0]),
    division=st.sampled_from(["m", "alpha", "even", "people", "people and m", "people, own test"]),
)
def test_no_test_row_is_ever_trained_on(seed: int, shift: float, division: str):
    counts = [[30, 20, 25], [12, 40, 9], [22, 22, 22], [35, 11, 18]]
    m = {"m": 3, "people and m": 2}.get(division)
    source = digits()
    if division.startswith("people"):
        source = people(counts, test_counts=[[5, 5, 5]] * 4 if "own" in division else None)
    environment = Environment(
        source,
        devices=4,
        classes_per_device=m,
        alpha=0.5 if division == "alpha" else None,
        seed=seed,
        shift=shift,
        samples_per_device=(15, 30),
        test_samples=20,
    )
    check_test_rows_are_nobodys_training_rows(environment, phases=4)
    test_labels = int_column(environment.test_pool, "label")
    labels = int_column(source.train, "label")
    for number in range(4):
        for phase in range(4):
            train = environment.device_train_rows(number, phase)
            test = environment.device_test_rows(number, phase)
            assert len(np.unique(train)) == len(train) > 0
            assert len(np.unique(test)) == len(test) > 0
            assert set(test_labels[test]) <= set(labels[train])


@settings(max_examples=12)
@given(seed=seeds, m=st.integers(1, 6), shift=st.sampled_from([0.25, 0.5, 1.0]))
def test_classes_move_under_label_skew(seed: int, m: int, shift: float):
    environment = label_skew(6, m, seed, shift=shift, samples_per_device=(20, 60))
    labels = int_column(digits().train, "label")
    for number in range(6):
        for phase in range(1, 4):
            before, after = (environment.device_train_rows(number, p) for p in (phase - 1, phase))
            old, new = set(labels[before]), set(labels[after])
            moved = min(max(1, round(shift * m)), 10 - m)
            assert len(new) == m
            assert len(new - old) == moved
            assert len(after) == len(before)
            # The share asked for, or more where the classes that leave had more.
            leaving = sum((labels[before] == c).sum() for c in old - new)
            replaced = len(np.setdiff1d(before, after))
            assert replaced == max(leaving, round(shift * len(before)))


@settings(max_examples=8)
@given(seed=seeds, shift=st.sampled_from([0.0, 0.3, 1.0]))
def test_a_share_is_replaced_where_classes_are_drawn(seed: int, shift: float):
    even = Environment(
        digits(),
        devices=5,
        classes_per_device=None,
        seed=seed,
        shift=shift,
        samples_per_device=(20, 60),
    )
    for environment in (alpha_skew(5, seed=seed, shift=shift), even):
        for number in range(5):
            before, after = (environment.device_train_rows(number, phase) for phase in (0, 1))
            assert len(after) == len(before)
            assert len(np.setdiff1d(after, before)) == round(shift * len(before))


def test_a_person_stays_the_same_person():
    source = people([[60, 60, 60], [60, 60, 60], [60, 60, 60]])
    environment = Environment(
        source, devices=3, classes_per_device=None, seed=0, samples_per_device=(20, 30)
    )
    owner = int_column(source.train, "device")
    for number in range(3):
        for phase in range(3):
            rows = environment.device_train_rows(number, phase)
            assert set(owner[rows]) == {number}
            assert set(owner[environment.device_test_rows(number, phase)]) == {number}
        first, second = (environment.device_train_rows(number, phase) for phase in (0, 1))
        assert len(np.setdiff1d(second, first)) == round(0.5 * len(first))


def test_people_without_spare_samples_keep_what_they_have():
    source = people([[14, 14, 14], [14, 14, 14]])
    environment = Environment(source, devices=2, classes_per_device=None, seed=0)
    first, second = (environment.device_train_rows(0, phase) for phase in (0, 1))
    assert np.array_equal(first, second)


def test_dirichlet_is_more_skewed_for_a_smaller_alpha():
    def largest_share(alpha: float) -> float:
        environment = alpha_skew(alpha=alpha)
        labels = int_column(digits().train, "label")
        counts = [np.bincount(labels[environment.device_train_rows(i)]) for i in range(12)]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share(0.1) > 0.5 > 0.25 > largest_share(100.0)
    check_train_rows_are_nobody_elses(alpha_skew(alpha=0.1))


def test_a_phase_does_not_depend_on_which_was_asked_first():
    first, again = label_skew(5), label_skew(5)
    late = first.device_train_rows(2, 3)
    for phase in range(4):
        again.device_train_rows(2, phase)
    assert np.array_equal(late, again.device_train_rows(2, 3))
    assert not np.array_equal(late, first.device_train_rows(2, 2))
    assert first.device(2, 3).classes == again.device(2, 3).classes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": 0.0}, "`alpha` above 0"),
        ({"shift": 1.5}, "`shift` from 0 to 1"),
        ({"alpha": 1.0, "classes_per_device": 2}, "or `alpha`, got both"),
        ({"alpha": 0.001, "devices": 700}, "raise alpha"),
    ],
)
def test_bad_divisions_are_refused(changes: dict, said: str):
    with pytest.raises(DataError, match=said):
        Environment(digits(), **{"devices": 20, "classes_per_device": None, "seed": 0, **changes})
