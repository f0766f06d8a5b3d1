"""How a data set is divided at the start: what is the cloud's, and which rows a device draws from.

A share of the training data is the cloud's and never reaches a device. The rest is divided

- by **label skew**, the paper's m classes a device, through flwr-datasets'
  ``PathologicalPartitioner`` in its "first-deterministic" mode: with at least as many devices as
  classes every class has a device, which fully random classes do not promise to a small fleet;
- by a **Dirichlet** distribution over classes, through ``DirichletPartitioner``, balanced as in
  the code of those who introduced it (Yurochkin et al. 2019), since devices are cut to size anyway;
- in its **natural** way: a device is a person or a speaker, as the data says;
- **evenly**, through ``IidPartitioner``, where there is no natural way.

Devices never overlap here. The paper's 500 devices of 50 to 150 samples need more than CIFAR has
left; a device that finds less keeps what it has.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import datasets
import numpy as np
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    Partitioner,
    PathologicalPartitioner,
)
from numpy.typing import NDArray

from simulations.datasets import DataError, LabelledData, int_column
from simulations.environment.rows import Rows, expect, generator, in_order, join

# Share of each (person, class) that is kept for tests where the data names no test rows.
OWN_TEST_SHARE = 0.3
# A natural partition with more devices than this has its classes as sub-tasks.
MOST_NATURAL_SUB_TASKS = 64
_LEAST_DIRICHLET_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What is known of a data set without looking at a sample.

    Attributes
    ----------
    train, test : Rows
        Label of each row of the training data and of the test pool.
    owner, test_owner : Rows | None
        Person of each row, where the data has people.
    own_test : bool
        The data names no test rows: its test pool is its training data.
    num_classes : int
    """

    train: Rows
    test: Rows
    owner: Rows | None
    test_owner: Rows | None
    own_test: bool
    num_classes: int

    @classmethod
    def of(cls, data: LabelledData) -> Labels:
        """Read the columns of a data set."""
        pool = data.train if data.test is None else data.test
        people = "device" in data.train.column_names
        return cls(
            train=int_column(data.train, "label"),
            test=int_column(pool, "label"),
            owner=int_column(data.train, "device") if people else None,
            test_owner=int_column(pool, "device") if people else None,
            own_test=data.test is None,
            num_classes=data.num_classes,
        )


@dataclass(frozen=True, kw_only=True)
class Division:
    """A divided data set, in row numbers.

    Attributes
    ----------
    proxy, sub_tasks : Rows
        The cloud's training rows, and the sub-task of each.
    cloud_test : Rows
        Test rows of all classes and devices.
    shares : list of Rows
        Training rows of each device, before they are cut to size.
    pools : list of Rows
        Training rows that each device may hold later.
    own_tests : list of Rows | None
        Under a natural division, the test rows of each device.
    """

    proxy: Rows
    sub_tasks: Rows
    cloud_test: Rows
    shares: list[Rows]
    pools: list[Rows]
    own_tests: list[Rows] | None


def natural(labels: Labels, *, devices: int, seed: int, proxy_share: float) -> Division:
    """Per person and class: the first rows to the cloud, the next to the device, then test."""
    assert labels.owner is not None
    assert labels.test_owner is not None
    people = int(max(labels.owner.max(), labels.test_owner.max())) + 1
    expect(devices <= people, f"`devices` of at most {people}", devices)
    chosen = np.arange(people)
    if devices < people:
        chosen = generator(seed, "people").permutation(people)[:devices]
    tail = OWN_TEST_SHARE if labels.own_test else 0
    split = [
        [in_order(group, proxy_share, tail) for group in groups]
        for groups in groups_of(labels, labels.owner, chosen)
    ]
    proxy, shares, tests = ([join([g[i] for g in groups]) for groups in split] for i in range(3))
    if not labels.own_test:
        tests = [np.flatnonzero(labels.test_owner == person) for person in chosen]
    for person, train, test in zip(chosen, shares, tests, strict=True):
        got = f"{len(train)} and {len(test)} for number {person} of the column `device`"
        remedy = "give them more rows of each class, or leave them out"
        expect(len(train) > 0 < len(test), "training and test rows in each device", got, remedy)
    rows = np.concatenate(proxy)
    tasks: NDArray[np.int64] = np.repeat(np.arange(devices), [len(part) for part in proxy])
    if devices > MOST_NATURAL_SUB_TASKS:
        tasks = labels.train[rows]
    return Division(
        proxy=rows,
        sub_tasks=np.unique(tasks, return_inverse=True)[1],
        cloud_test=join(tests),
        shares=shares,
        pools=shares,
        own_tests=tests,
    )


def drawn(
    labels: Labels,
    *,
    devices: int,
    seed: int,
    proxy_share: float,
    classes_per_device: int | None,
    alpha: float | None,
) -> Division:
    """Draw the proxy rows at random, and let flwr-datasets divide the others."""
    rows, test = np.arange(len(labels.train)), np.arange(len(labels.test))
    if labels.own_test:  # keep back each person's last rows, as in the natural way
        assert labels.owner is not None
        people = groups_of(labels, labels.owner, np.unique(labels.owner))
        split = [in_order(group, 0, OWN_TEST_SHARE) for groups in people for group in groups]
        rows, test = (join([parts[i] for parts in split]) for i in (1, 2))
    rows = generator(seed, "proxy").permutation(rows)
    proxy, rest = np.split(rows, [round(len(rows) * proxy_share)])
    partitioner = _partitioner(devices, seed, classes_per_device, alpha)
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels.train[rest], "row": rest})
    try:
        with warnings.catch_warnings():  # a class that no device has is fine, and so is a retry
            warnings.simplefilter("ignore")
            parts = [partitioner.load_partition(i) for i in range(devices)]
    except (ValueError, IndexError) as error:
        way = (
            f"by a Dirichlet distribution of {alpha}"
            if alpha
            else (f"of {classes_per_device or 'all'} classes")
        )
        raise DataError(
            f"Could not divide {len(rest)} training samples among {devices} devices {way}: reduce "
            f"the devices{', or raise alpha' if alpha else ''}. Reason given: {error}"
        ) from error
    return Division(
        proxy=proxy,
        sub_tasks=np.unique(labels.train[proxy], return_inverse=True)[1],
        cloud_test=test,
        shares=[int_column(part, "row") for part in parts],
        pools=[np.sort(rest)] * devices,
        own_tests=None,
    )


def _partitioner(devices: int, seed: int, m: int | None, alpha: float | None) -> Partitioner:
    number = int(generator(seed, "classes of the devices").integers(2**31))
    if m is not None:
        return PathologicalPartitioner(
            num_partitions=devices,
            partition_by="label",
            num_classes_per_partition=m,
            class_assignment_mode="first-deterministic",
            shuffle=False,
            seed=number,
        )
    if alpha is not None:
        return DirichletPartitioner(
            num_partitions=devices,
            partition_by="label",
            alpha=alpha,
            min_partition_size=_LEAST_DIRICHLET_SAMPLES,
            self_balancing=True,
            shuffle=False,
            seed=number,
        )
    return IidPartitioner(devices)


def groups_of(labels: Labels, owner: Rows, people: Rows) -> list[list[Rows]]:
    """Rows of the training data of each person, class by class, in their original order."""
    key = owner * labels.num_classes + labels.train
    order = np.argsort(key, kind="stable")
    groups: dict[int, list[Rows]] = {int(person): [] for person in people}
    for group in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        if (person := int(owner[group[0]])) in groups:
            groups[person].append(group)
    return list(groups.values())
