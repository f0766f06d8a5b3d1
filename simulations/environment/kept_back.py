"""Validation worlds: what a choice may look at, so that reported test data stays unseen.

Some of the training data is kept back, reaches neither the cloud nor any device, and takes the
place of the test data. The test rows themselves are left out. All else follows as ever: a
validation world is an ordinary world on the data that is left.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from simulations.datasets import LabelledData
from simulations.environment.division import OWN_TEST_SHARE, Labels, groups_of
from simulations.environment.rows import Rows, by_class, generator, in_order, join

#: Of the training data, and of each person's and class's where there are people.
VALIDATION_SHARE = 0.2


def for_validation(data: LabelledData) -> LabelledData:
    """Return the data set of a validation world.

    Parameters
    ----------
    data : LabelledData
        Whose ``test``, if there is any, is not in the result.
    """
    train, kept_back = validation_rows(Labels.of(data))
    return replace(data, train=data.train.select(train), test=data.train.select(kept_back))


def validation_rows(labels: Labels) -> tuple[Rows, Rows]:
    """Split the rows of the training data into what is left to train on, and what is kept back.

    Where there are people, the last rows of each (person, class) are kept back, with a gap before
    them as in `in_order`; where nothing says how rows follow each other, rows at random, the same
    ones for every seed of an experiment. Rows that a world would test on are in neither.
    """
    if labels.owner is None:
        rng = generator(0, "validation")
        mixed = [rng.permutation(rows) for rows in by_class(_all(labels), labels.train).values()]
        stops = [int(len(rows) * VALIDATION_SHARE) for rows in mixed]
        halves = [np.split(rows, [stop]) for rows, stop in zip(mixed, stops, strict=True)]
        return join([left for _, left in halves]), join([kept for kept, _ in halves])
    groups = [g for own in groups_of(labels, labels.owner, np.unique(labels.owner)) for g in own]
    if labels.own_test:
        groups = [in_order(group, 0, OWN_TEST_SHARE)[1] for group in groups]
    split = [in_order(group, 0, VALIDATION_SHARE) for group in groups]
    return join([middle for _, middle, _ in split]), join([last for _, _, last in split])


def _all(labels: Labels) -> Rows:
    return np.arange(len(labels.train))
