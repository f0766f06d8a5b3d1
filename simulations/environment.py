"""Who sees which data: the cloud's proxy data, and every device's training and test rows.

Three ways to divide one data set (PAPER.md section 4):

- **label skew**, the paper's m classes a device, through flwr-datasets' ``PathologicalPartitioner``
  in its "first-deterministic" mode: with at least as many devices as classes every class has a
  device, which fully random classes do not promise to a small fleet;
- **natural**: a device is a person or a speaker, as the data says;
- **even**: neither, through ``IidPartitioner``.

A share of the training data is the cloud's and never reaches a device. The paper's 500 devices of
50 to 150 samples need more than CIFAR has left; here devices never overlap, and one that has less
keeps what it has. Everything works on row numbers; samples are decoded when a device is asked for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from flwr_datasets.partitioner import IidPartitioner, Partitioner, PathologicalPartitioner
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from simulations.datasets import DataError, LabelledData, int_column

Rows = NDArray[np.int64]

# Share of each (device, class) that is the device's test part where the data names no test rows.
OWN_TEST_SHARE = 0.3
# A natural partition with more devices than this has its classes as sub-tasks.
MOST_NATURAL_SUB_TASKS = 64
_CACHED_DEVICES = 32


@dataclass(frozen=True, kw_only=True)
class DeviceData:
    """What one device holds: ``(x, y)`` of its training and test samples, and its classes."""

    train: TensorDataset
    test: TensorDataset
    classes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Division:
    """Row numbers before the devices' shares are cut to size."""

    proxy: Rows
    sub_tasks: NDArray[np.int64]
    cloud_test: Rows
    shares: list[Rows]
    own_tests: list[Rows] | None  # natural partition only


class Environment:
    """One data set divided between the cloud and the devices.

    Parameters
    ----------
    data : LabelledData
        What is divided.
    devices : int
        Number of devices. Under a natural partition at most the number of people; if less, a
        seeded choice of them.
    classes_per_device : int | None
        m: label skew, whatever natural partition there is. None: the natural partition, or an even
        one where there is none.
    seed : int
        Not negative. Same seed, same rows.
    proxy_share : float (default: 0.3)
        Share of the training data that is the cloud's. The paper's value.
    samples_per_device : tuple[int, int] (default: (50, 150))
        Training samples of a device: drawn uniformly, both ends included, and cut in proportion to
        its classes. Under label skew never less than two of each class. The paper's range.
    test_samples : int (default: 200)
        Most test samples of a device. Paper: not stated; with 200 the standard error of one
        device's accuracy is about 3 points.

    Attributes
    ----------
    num_devices, num_classes : int
    input_shape : tuple[int, ...]
        Of one sample, without the batch axis.
    test_pool : datasets.Dataset
        What test rows are numbers into: ``data.test``, or ``data.train`` where there is none.
    proxy_rows : NDArray[np.int64]
        The cloud's rows of ``data.train``, in the order of ``proxy()``.
    proxy_sub_tasks : torch.Tensor
        int64 ``[len(proxy_rows)]``. The device of each proxy sample under a natural partition with
        at most 64 devices, else its label.
    cloud_test_rows : NDArray[np.int64]
        Rows of ``test_pool`` for the accuracy of whole models: all classes, all devices.

    Raises
    ------
    DataError
        If the numbers make no sense, or a device would be left without usable data.
    """

    def __init__(
        self,
        data: LabelledData,
        *,
        devices: int,
        classes_per_device: int | None,
        seed: int,
        proxy_share: float = 0.3,
        samples_per_device: tuple[int, int] = (50, 150),
        test_samples: int = 200,
    ) -> None:
        m, classes, (low, high) = classes_per_device, data.num_classes, samples_per_device
        _expect(devices >= 1, "`devices` of at least 1", devices)
        _expect(m is None or 1 <= m <= classes, f"`classes_per_device` of 1 to {classes}", m)
        _expect(seed >= 0, "`seed` of at least 0", seed)
        most = 1 - OWN_TEST_SHARE
        _expect(0 < proxy_share < most, f"`proxy_share` between 0 and {most}", proxy_share)
        _expect(1 <= low <= high, "`samples_per_device` with 1 <= low <= high", (low, high))
        _expect(test_samples >= 1, "`test_samples` of at least 1", test_samples)

        self._data, self._seed = data, seed
        self.num_devices, self.num_classes = devices, classes
        self.input_shape = data.input_shape
        self.test_pool = data.train if data.test is None else data.test
        self._labels = int_column(data.train, "label")
        self._test_labels = int_column(self.test_pool, "label")
        natural = m is None and "device" in data.train.column_names
        division = self._natural(proxy_share) if natural else self._drawn(proxy_share, m)
        self.proxy_rows, self.cloud_test_rows = division.proxy, division.cloud_test
        self.proxy_sub_tasks = torch.from_numpy(division.sub_tasks)
        sizes = self._generator("samples per device").integers(low, high, devices, endpoint=True)
        self._train_rows = [
            self._cut(number, division.shares[number], int(sizes[number]), 0 if m is None else 2)
            for number in range(devices)
        ]
        self._test_rows = [
            self._like_training(number, test_samples)
            if division.own_tests is None
            else self._at_most(number, division.own_tests[number], test_samples)
            for number in range(devices)
        ]
        self._decoded: dict[int, DeviceData] = {}

    def proxy(self) -> TensorDataset:
        """Decode the cloud's labelled samples ``(x, y)``, anew in every call: keep the result."""
        return self._decode(self._data.train, self.proxy_rows)

    def cloud_test(self) -> TensorDataset:
        """Decode the cloud's test samples ``(x, y)``, anew in every call: keep the result."""
        return self._decode(self.test_pool, self.cloud_test_rows)

    def device(self, number: int) -> DeviceData:
        """Decode what device ``number`` (from 0) holds; the last 32 devices are kept."""
        train, test = self.device_train_rows(number), self.device_test_rows(number)
        if number not in self._decoded:
            while len(self._decoded) >= _CACHED_DEVICES:
                self._decoded.pop(next(iter(self._decoded)))
            self._decoded[number] = DeviceData(
                train=self._decode(self._data.train, train),
                test=self._decode(self.test_pool, test),
                classes=tuple(np.unique(self._labels[train]).tolist()),
            )
        return self._decoded[number]

    def device_train_rows(self, number: int) -> Rows:
        """Return the rows of ``data.train`` that device ``number`` trains on, ascending."""
        self._check_number(number)
        return self._train_rows[number]

    def device_test_rows(self, number: int) -> Rows:
        """Return the rows of ``test_pool`` that device ``number`` is tested on, ascending."""
        self._check_number(number)
        return self._test_rows[number]

    # Dividing the data set

    def _natural(self, proxy_share: float) -> _Division:
        """Per person and class: the first rows to the cloud, the next to the device, then test."""
        owner, own = int_column(self._data.train, "device"), self._data.test is None
        test_owner = owner if own else int_column(self.test_pool, "device")
        people = int(max(owner.max(), test_owner.max())) + 1
        _expect(self.num_devices <= people, f"`devices` of at most {people}", self.num_devices)
        chosen = np.arange(people)
        if self.num_devices < people:
            chosen = self._generator("people").permutation(people)[: self.num_devices]
        split = [
            [_in_order(group, proxy_share, OWN_TEST_SHARE if own else 0) for group in groups]
            for groups in self._groups(owner, chosen)
        ]
        proxy, shares, tests = (
            [_join([g[i] for g in groups]) for groups in split] for i in range(3)
        )
        if not own:
            tests = [np.flatnonzero(test_owner == person) for person in chosen]
        for person, train, test in zip(chosen, shares, tests, strict=True):
            got = f"{len(train)} and {len(test)} for number {person} of the column `device`"
            remedy = "give them more rows of each class, or leave them out"
            _expect(
                len(train) > 0 < len(test), "training and test rows in each device", got, remedy
            )
        rows = np.concatenate(proxy)
        many = self.num_devices > MOST_NATURAL_SUB_TASKS
        device = np.repeat(np.arange(self.num_devices), [len(part) for part in proxy])
        return _Division(
            proxy=rows,
            sub_tasks=np.unique(self._labels[rows] if many else device, return_inverse=True)[1],
            cloud_test=_join(tests),
            shares=shares,
            own_tests=tests,
        )

    def _drawn(self, proxy_share: float, m: int | None) -> _Division:
        """Draw the proxy rows at random, and let flwr-datasets divide the others."""
        rows, test = np.arange(len(self._labels)), np.arange(len(self._test_labels))
        if self._data.test is None:  # keep back each person's last rows, as in the natural way
            owner = int_column(self._data.train, "device")
            groups = [g for person in self._groups(owner, np.unique(owner)) for g in person]
            split = [_in_order(group, 0, OWN_TEST_SHARE) for group in groups]
            rows, test = (_join([parts[i] for parts in split]) for i in (1, 2))
        rows = self._generator("proxy").permutation(rows)
        proxy, rest = np.split(rows, [round(len(rows) * proxy_share)])
        partitioner: Partitioner = IidPartitioner(self.num_devices)
        if m is not None:
            partitioner = PathologicalPartitioner(
                num_partitions=self.num_devices,
                partition_by="label",
                num_classes_per_partition=m,
                class_assignment_mode="first-deterministic",
                shuffle=False,
                seed=int(self._generator("classes of the devices").integers(2**31)),
            )
        partitioner.dataset = datasets.Dataset.from_dict({"label": self._labels[rest], "row": rest})
        try:
            with warnings.catch_warnings():  # a class that no device has is fine
                warnings.simplefilter("ignore")
                parts = [partitioner.load_partition(i) for i in range(self.num_devices)]
        except (ValueError, IndexError) as error:
            raise DataError(
                f"Could not divide {len(rest)} training samples among {self.num_devices} devices "
                f"of {m or 'all'} classes: reduce the devices. Reason given: {error}"
            ) from error
        return _Division(
            proxy=proxy,
            sub_tasks=np.unique(self._labels[proxy], return_inverse=True)[1],
            cloud_test=test,
            shares=[int_column(part, "row") for part in parts],
            own_tests=None,
        )

    def _groups(self, owner: Rows, people: Rows) -> list[list[Rows]]:
        """Rows of ``data.train`` of each person, class by class, in their original order."""
        key = owner * self.num_classes + self._labels
        order = np.argsort(key, kind="stable")
        groups: dict[int, list[Rows]] = {int(person): [] for person in people}
        for group in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            if (person := int(owner[group[0]])) in groups:
                groups[person].append(group)
        return list(groups.values())

    def _cut(self, number: int, rows: Rows, size: int, least: int) -> Rows:
        """Keep ``size`` of a device's rows in the proportion of its classes, ``least`` of each."""
        have = np.bincount(self._labels[rows], minlength=self.num_classes)
        enough = len(rows) >= 2 and have[have > 0].min() >= least
        wanted = "at least 2 training samples" + (" of each class of a device" if least else "")
        got = f"{have[have > 0].tolist()} on device {number}"
        _expect(enough, wanted, got, "reduce the devices, or the classes per device")
        base = np.minimum(have, least)
        size = max(min(size, len(rows)) - int(base.sum()), 0)
        counts = base + _apportion(size, have - base)
        return self._pick(f"training rows of device {number}", rows, self._labels, counts)

    def _like_training(self, number: int, most: int) -> Rows:
        """Draw a device's test rows from the pool, in the proportion of its training classes."""
        train = np.bincount(self._labels[self._train_rows[number]], minlength=self.num_classes)
        pool = np.bincount(self._test_labels[self.cloud_test_rows], minlength=self.num_classes)
        weights = np.where(pool > 0, train, 0)
        remedy = "add test samples of these classes"
        got = f"none of {np.flatnonzero(train).tolist()} for device {number}"
        _expect(bool(weights.any()), "test samples of a device's classes", got, remedy)
        held = weights > 0  # so many that no class runs out before the others
        size = int((pool[held] * weights.sum() / weights[held]).min())
        counts = np.minimum(_apportion(max(1, min(most, size)), weights), pool)
        purpose = f"test rows of device {number}"
        return self._pick(purpose, self.cloud_test_rows, self._test_labels, counts)

    def _at_most(self, number: int, rows: Rows, most: int) -> Rows:
        return np.sort(self._generator(f"test rows of device {number}").permutation(rows)[:most])

    def _pick(self, purpose: str, rows: Rows, labels: Rows, counts: Rows) -> Rows:
        """Draw ``counts[c]`` of the rows of each class c; ascending."""
        rows = self._generator(purpose).permutation(rows)
        return _join([rows[labels[rows] == c][: counts[c]] for c in np.flatnonzero(counts)])

    def _generator(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, *purpose.encode()])

    def _decode(self, pool: datasets.Dataset, rows: Rows) -> TensorDataset:
        return TensorDataset(*self._data.tensors(pool.select(rows)))

    def _check_number(self, number: int) -> None:
        last = self.num_devices - 1
        _expect(0 <= number <= last, f"a device number from 0 to {last}", number)


def _in_order(rows: Rows, head: float, tail: float) -> tuple[Rows, Rows, Rows]:
    """Split rows into a first, a middle and a last part.

    Neighbouring rows can overlap in time (windows of a recording), so where there are at least 10
    rows, the middle part loses one at each border it has.
    """
    first, last = int(len(rows) * head), int(len(rows) * tail)
    gap = int(len(rows) >= 10)
    stop = len(rows) - last
    return rows[:first], rows[first + gap * (first > 0) : stop - gap * (last > 0)], rows[stop:]


def _apportion(size: int, weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole numbers that sum to ``size``, in proportion to the weights (largest remainders)."""
    exact = size * weights / max(1, int(weights.sum()))
    whole: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: size - int(whole.sum())]] += 1
    return whole


def _join(parts: list[Rows]) -> Rows:
    """One ascending array of all rows; empty where there are none."""
    return np.sort(np.concatenate([np.zeros(0, np.int64), *parts]))


def _expect(fine: bool, expected: str, got: object, remedy: str = "") -> None:
    if not fine:
        raise DataError(f"Expected {expected}, got {got}{'; ' if remedy else ''}{remedy}.")
