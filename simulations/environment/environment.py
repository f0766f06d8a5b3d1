"""The environment: what data the cloud and every device see, at the start and as time goes by.

Everything works on row numbers; samples are decoded when a device is asked for. A device's test
rows come from a pool that nobody trains on, at any time: the data's own test rows, or rows that
were kept back. They follow what the device trains on at present, and look the way it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from simulations.datasets import LabelledData
from simulations.environment.division import OWN_TEST_SHARE, Labels, drawn, natural
from simulations.environment.feature_shift import FeatureShift, Surroundings
from simulations.environment.rows import Rows, apportion, by_class, expect, generator, pick
from simulations.environment.shifts import move_classes, redraw

_CACHED_DEVICES = 32
#: Most test samples that whole models are judged by: a standard error of at most 1.1 points.
CLOUD_TEST_SAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class DeviceData:
    """What one device holds: ``(x, y)`` of its training and test samples, and its classes."""

    train: TensorDataset
    test: TensorDataset
    classes: tuple[int, ...]


class Environment:
    """One data set divided between the cloud and the devices, over time.

    Time goes in phases: phase 0 is how the data was divided, and with each phase a share of every
    device's data is replaced.

    Parameters
    ----------
    data : LabelledData
        What is divided.
    devices : int
        Number of devices. Under a natural partition at most the number of people; if less, a
        seeded choice of them.
    classes_per_device : int | None
        m: label skew, whatever natural partition there is. None: see `alpha`.
    seed : int
        Not negative. Same seed, same rows.
    alpha : float | None (default: None)
        Of a Dirichlet division by class. None, and no m: the natural partition, or an even one
        where there is none.
    shift : float (default: 0.5)
        Share of a device's data that each phase replaces; see `shifts`. The paper's value.
    feature_shift : FeatureShift | None (default: None)
        Groups of devices see their data in views of their own. Then classes stay, and each phase
        moves groups to other views.
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
    images : bool
        Samples are images.
    test_pool : datasets.Dataset
        What test rows are numbers into: ``data.test``, or ``data.train`` where there is none.
    proxy_rows : NDArray[np.int64]
        The cloud's rows of ``data.train``, in the order of ``proxy()``.
    proxy_sub_tasks : torch.Tensor
        int64 ``[len(proxy_rows)]``: the view of each proxy sample where views are known, the device
        under a natural partition with at most 64 devices, else the label.
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
        alpha: float | None = None,
        shift: float = 0.5,
        feature_shift: FeatureShift | None = None,
        proxy_share: float = 0.3,
        samples_per_device: tuple[int, int] = (50, 150),
        test_samples: int = 200,
    ) -> None:
        m, classes, (low, high) = classes_per_device, data.num_classes, samples_per_device
        expect(devices >= 1, "`devices` of at least 1", devices)
        expect(m is None or 1 <= m <= classes, f"`classes_per_device` of 1 to {classes}", m)
        expect(m is None or alpha is None, "`classes_per_device` or `alpha`", "both")
        expect(alpha is None or alpha > 0, "`alpha` above 0", alpha)
        expect(0 <= shift <= 1, "`shift` from 0 to 1", shift)
        expect(seed >= 0, "`seed` of at least 0", seed)
        most = 1 - OWN_TEST_SHARE
        expect(0 < proxy_share < most, f"`proxy_share` between 0 and {most}", proxy_share)
        expect(1 <= low <= high, "`samples_per_device` with 1 <= low <= high", (low, high))
        expect(test_samples >= 1, "`test_samples` of at least 1", test_samples)

        self._data, self._seed, self._shift = data, seed, shift
        self._m, self._alpha = m, alpha
        self._test_samples = test_samples
        self.num_devices, self.num_classes = devices, classes
        self.input_shape, self.images = data.input_shape, data.images
        self.test_pool = data.train if data.test is None else data.test
        self._labels = labels = Labels.of(data)
        if m is None and alpha is None and labels.owner is not None:
            division = natural(labels, devices=devices, seed=seed, proxy_share=proxy_share)
        else:
            division = drawn(
                labels,
                devices=devices,
                seed=seed,
                proxy_share=proxy_share,
                classes_per_device=m,
                alpha=alpha,
            )
        self._division = division
        self.proxy_rows, self.cloud_test_rows = division.proxy, division.cloud_test
        sub_tasks = division.sub_tasks
        self._surroundings: Surroundings | None = None
        self._proxy_views: Rows | None = None
        if feature_shift is not None:
            self._surroundings = Surroundings(
                feature_shift, images=data.images, devices=devices, seed=seed, share=shift
            )
            if feature_shift.known:
                sub_tasks = self._surroundings.spread(len(division.proxy), "views of the proxy")
                self._proxy_views = sub_tasks
        self.proxy_sub_tasks = torch.from_numpy(sub_tasks)
        sizes = self._generator("samples per device").integers(low, high, devices, endpoint=True)
        self._train_rows = [
            [self._cut(number, division.shares[number], int(sizes[number]), 0 if m is None else 2)]
            for number in range(devices)
        ]
        for number in range(devices):  # refuse now what could not be tested later
            self.device_test_rows(number)
        self._pools: dict[int, dict[int, Rows]] = {}
        self._decoded: dict[tuple[int, int], DeviceData] = {}

    @property
    def sub_tasks_are_classes(self) -> bool:
        """Whether a sample's label is its sub-task, so that devices need not guess theirs."""
        labels = self._labels.train[self.proxy_rows]  # sub-tasks are numbered without gaps
        return np.array_equal(self.proxy_sub_tasks, np.unique(labels, return_inverse=True)[1])

    def proxy(self) -> TensorDataset:
        """Decode the cloud's labelled samples ``(x, y)``, anew in every call: keep the result."""
        return self._decode(self._data.train, self.proxy_rows, self._proxy_views, "proxy")

    def cloud_test(self) -> TensorDataset:
        """Decode what whole models are judged by, anew in every call: keep the result.

        At most `CLOUD_TEST_SAMPLES`, drawn from the cloud's test rows; in all views where there are
        views.
        """
        rows = self._generator("cloud test").permutation(self.cloud_test_rows)[:CLOUD_TEST_SAMPLES]
        views = None
        if self._surroundings is not None:
            views = self._surroundings.spread(len(rows), "views of the cloud's test")
        return self._decode(self.test_pool, rows, views, "cloud test")

    def device(self, number: int, phase: int = 0) -> DeviceData:
        """Decode what device ``number`` (from 0) holds in a phase; the last 32 are kept."""
        train, test = self.device_train_rows(number, phase), self.device_test_rows(number, phase)
        if (number, phase) not in self._decoded:
            while len(self._decoded) >= _CACHED_DEVICES:
                self._decoded.pop(next(iter(self._decoded)))
            view = None
            if self._surroundings is not None:
                view = self._surroundings.view_of(number, phase)
            purpose = f"device {number} in phase {phase}"
            self._decoded[number, phase] = DeviceData(
                train=self._decode(self._data.train, train, view, f"{purpose}, training"),
                test=self._decode(self.test_pool, test, view, f"{purpose}, test"),
                classes=tuple(np.unique(self.device_labels(number, phase)).tolist()),
            )
        return self._decoded[number, phase]

    def view_of(self, number: int, phase: int = 0) -> int | None:
        """Return the number of the view a device has in a phase; None where there are no views."""
        return self._surroundings.view_of(number, phase) if self._surroundings else None

    def device_train_rows(self, number: int, phase: int = 0) -> Rows:
        """Return the rows of ``data.train`` that device ``number`` trains on, ascending."""
        self._check_number(number)
        while len(self._train_rows[number]) <= phase:
            self._train_rows[number].append(self._shifted(number, len(self._train_rows[number])))
        return self._train_rows[number][phase]

    def device_labels(self, number: int, phase: int = 0) -> NDArray[np.int64]:
        """Return the labels that device ``number`` trains on, without decoding a sample."""
        return self._labels.train[self.device_train_rows(number, phase)]

    def device_test_rows(self, number: int, phase: int = 0) -> Rows:
        """Return the rows of ``test_pool`` that device ``number`` is tested on, ascending.

        In the proportion of its training classes; a person's own rows under a natural partition.
        """
        own = self._division.own_tests
        purpose = f"test rows of device {number}" + (f" in phase {phase}" if phase else "")
        train = self.device_train_rows(number, phase)
        if own is not None and phase == 0:
            return np.sort(self._generator(purpose).permutation(own[number])[: self._test_samples])
        pool = self.cloud_test_rows if own is None else own[number]
        return self._like(train, pool, number, purpose)

    def _shifted(self, number: int, phase: int) -> Rows:
        """Return a device's training rows in a phase, from those of the phase before."""
        held, labels = self._train_rows[number][phase - 1], self._labels.train
        if number not in self._pools:
            key = number if self._division.own_tests is not None else -1  # one pool for all
            if key not in self._pools:
                self._pools[key] = by_class(self._division.pools[number], labels)
            self._pools[number] = self._pools[key]
        pool, share = self._pools[number], self._shift
        rng = self._generator(f"data of device {number} in phase {phase}")
        weights = np.bincount(labels[held], minlength=self.num_classes) / len(held)
        if self._surroundings is not None:
            return redraw(held, pool, share, weights, rng)
        if self._m is not None:
            return move_classes(held, labels, pool, share, rng)
        if self._alpha is not None:
            weights = rng.dirichlet(np.full(self.num_classes, self._alpha))
        elif self._division.own_tests is not None:
            weights = rng.dirichlet(np.ones(self.num_classes))
        return redraw(held, pool, share, weights, rng)

    def _cut(self, number: int, rows: Rows, size: int, least: int) -> Rows:
        """Keep ``size`` of a device's rows in the proportion of its classes, ``least`` of each."""
        have = np.bincount(self._labels.train[rows], minlength=self.num_classes)
        enough = len(rows) >= 2 and have[have > 0].min() >= least
        wanted = "at least 2 training samples" + (" of each class of a device" if least else "")
        got = f"{have[have > 0].tolist()} on device {number}"
        expect(enough, wanted, got, "reduce the devices, or the classes per device")
        base = np.minimum(have, least)
        size = max(min(size, len(rows)) - int(base.sum()), 0)
        counts = base + apportion(size, have - base)
        rng = self._generator(f"training rows of device {number}")
        return pick(rows, self._labels.train, counts, rng)

    def _like(self, train: Rows, pool: Rows, number: int, purpose: str) -> Rows:
        """Draw test rows from a pool, in the proportion of the classes of training rows."""
        labels = self._labels.test
        weights = np.bincount(self._labels.train[train], minlength=self.num_classes)
        have = np.bincount(labels[pool], minlength=self.num_classes)
        got = f"none of {np.flatnonzero(weights).tolist()} for device {number}"
        weights = np.where(have > 0, weights, 0)
        remedy = "add test samples of these classes"
        expect(bool(weights.any()), "test samples of a device's classes", got, remedy)
        held = weights > 0  # so many that no class runs out before the others
        size = int((have[held] * weights.sum() / weights[held]).min())
        counts = np.minimum(apportion(max(1, min(self._test_samples, size)), weights), have)
        return pick(pool, labels, counts, self._generator(purpose))

    def _generator(self, purpose: str) -> np.random.Generator:
        return generator(self._seed, purpose)

    def _decode(
        self, pool: datasets.Dataset, rows: Rows, views: int | Rows | None, purpose: str
    ) -> TensorDataset:
        x, y = self._data.tensors(pool.select(rows))
        if views is not None and self._surroundings is not None:
            x = self._surroundings.seen(x, views, purpose)
        return TensorDataset(x, y)

    def _check_number(self, number: int) -> None:
        last = self.num_devices - 1
        expect(0 <= number <= last, f"a device number from 0 to {last}", number)
