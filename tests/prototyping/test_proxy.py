import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from eclm_flower.errors import PrototypingError
from eclm_flower.prototyping.proxy import ProxyData

TASKS = [0, 1, 2, 0, 1, 2, 0]


def samples(number=7):
    return TensorDataset(torch.arange(number).float()[:, None], torch.arange(number))


@pytest.mark.parametrize("sub_tasks", [TASKS[:-1], [*TASKS, 0], [TASKS], []])
def test_every_sample_has_one_sub_task(sub_tasks):
    with pytest.raises(PrototypingError, match="one sub-task for each of 7 proxy samples"):
        ProxyData(samples(), sub_tasks)


def test_no_samples_are_refused():
    with pytest.raises(PrototypingError, match="0 proxy samples"):
        ProxyData(samples(0), [])


@pytest.mark.parametrize("sub_tasks", [[0, 2, 2, 0, 0, 2, 0], [1] * 7, [-1, 0, 1, 0, 0, 1, 0]])
def test_sub_tasks_are_numbered_from_0_without_gaps(sub_tasks):
    with pytest.raises(PrototypingError, match="from 0 without gaps"):
        ProxyData(samples(), sub_tasks)


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_epoch_shows_every_sample_once_with_its_sub_task(shuffled):
    data = ProxyData(samples(), torch.tensor(TASKS))
    assert (len(data), data.num_sub_tasks) == (7, 3)
    generator = torch.Generator().manual_seed(0)
    batches = list(data.shuffled([3, 3, 1], generator) if shuffled else data.in_order(3))
    assert [len(x) for x, _, _ in batches] == [3, 3, 1]
    x, y, tasks = map(torch.cat, zip(*batches, strict=True))
    assert (y.tolist() == list(range(7))) is not shuffled
    assert sorted(y.tolist()) == list(range(7))
    assert x.flatten().tolist() == y.tolist()
    assert tasks.tolist() == [TASKS[row] for row in y]


def test_only_training_batches_are_augmented():
    data = ProxyData(samples(), TASKS, augment=lambda x, _: x + 100)
    assert all((x >= 100).all() for x, *_ in data.shuffled([4, 3], torch.Generator()))
    assert all((x < 100).all() for x, *_ in data.in_order(3))


@pytest.mark.parametrize("sub_tasks", [[1], [0, 2], [2, 0, 1]])
def test_a_device_holds_its_sub_tasks_as_equally_as_it_goes_and_no_others(sub_tasks):
    data = ProxyData(samples(), TASKS)
    rows = data.device_rows(sub_tasks, 8, np.random.default_rng(0))
    held = [TASKS[row] for row in rows]
    counts = [held.count(task) for task in sub_tasks]
    assert len(rows) == sum(counts) == 8
    assert max(counts) - min(counts) <= 1
    assert rows == data.device_rows(sub_tasks, 8, np.random.default_rng(0))


def test_a_device_of_few_samples_sees_some_of_its_sub_tasks():
    data = ProxyData(samples(), TASKS)
    draws = [data.device_rows([0, 1, 2], 2, np.random.default_rng(seed)) for seed in range(20)]
    assert all(len({TASKS[row] for row in rows}) == 2 for rows in draws)
    assert {TASKS[row] for rows in draws for row in rows} == {0, 1, 2}
