"""A local adaptation that doesn't help is undone; one that does is kept."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from unequal_federation import Settings, local_data

from strategies.guard import adapt_guarded, split
from strategies.local_training import train


def ruin(model, data, settings, generator):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    return 0.0


def model_for(data: TensorDataset) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    train(model, data, Settings(local_epochs=5), torch.Generator())
    return model


def test_what_does_harm_is_undone_bit_for_bit():
    data = local_data(1)
    model = model_for(data)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert not adapt_guarded(ruin, model, data, Settings(), torch.Generator())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_what_changes_nothing_is_undone():
    data = local_data(1)
    assert not adapt_guarded(lambda *_: 0.0, model_for(data), data, Settings(), torch.Generator())


def test_what_helps_is_kept():
    data = local_data(1)
    model = model_for(data)
    ruin(model, data, Settings(), torch.Generator())
    before = model[0].weight.clone()
    assert adapt_guarded(train, model, data, Settings(local_epochs=20), torch.Generator())
    assert not torch.equal(model[0].weight, before)


def test_held_back_samples_are_not_trained_on_and_none_is_lost():
    x = torch.arange(23.0)[:, None]
    y = torch.tensor([0] * 10 + [1] * 12 + [2])
    rest, held_back = split(TensorDataset(x, y))
    assert held_back.tensors[0].flatten().tolist() == [8, 9, 20, 21]
    assert rest.tensors[0].flatten().tolist() == [*range(8), *range(10, 20), 22]
    seen = []
    adapt_guarded(
        lambda model, data, *_: seen.extend(data.tensors[1].tolist()) or 0.0,
        nn.Linear(1, 3),
        TensorDataset(x, y),
        Settings(),
        torch.Generator(),
    )
    assert len(seen) == 19


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_with_too_few_samples_a_device_adapts_as_ever(labels: list[int]):
    y, done = torch.tensor(labels), []
    data = TensorDataset(torch.randn(len(labels), 12), y)
    model = model_for(local_data(1))
    assert adapt_guarded(
        lambda model, data, *_: done.append(len(data)) or 0.0, model, data, Settings(), None
    )
    assert done == [len(labels)]
