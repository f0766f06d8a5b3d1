"""Where models compute: a GPU is refused where there is none, and moves only what has to move."""

import pytest
import torch
from experiments import column, run_tiny
from torch.utils.data import TensorDataset

from simulations.compute import expect_compute, moved
from simulations.settings import Settings, SettingsError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_compute("cpu")
    with pytest.raises(SettingsError, match="finds no GPU here, got 'cuda'"):
        run_tiny(tmp_path, compute="cuda")
    with pytest.raises(SettingsError, match="--compute from cpu, cuda, got 'tpu'"):
        Settings(compute="tpu")


def test_samples_that_are_there_are_not_copied():
    data = TensorDataset(torch.zeros(3, 2), torch.arange(3))
    assert moved(data, "cpu") is data
    there = moved(data, "meta")
    assert {tensor.device.type for tensor in there.tensors} == {"meta"}
    assert [tensor.shape for tensor in there.tensors] == [(3, 2), (3,)]


def test_models_and_samples_are_where_they_are_asked_to_be(monkeypatch, tmp_path):
    """With a device of another name for the CPU, all that is moved is seen."""
    asked = set()
    to = torch.nn.Module.to

    def watched(self, *args, **options):
        asked.update(arg for arg in args if isinstance(arg, str))
        return to(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    run_tiny(tmp_path, rounds=1, devices=4, per_round=2, strategies="eclm,adaptivenet")
    assert asked == {"cpu"}


@needs_gpu
def test_a_gpu_gives_what_the_cpu_gives_but_for_rounding(tmp_path):
    options = {"strategies": "eclm,fedavg,heterofl,adaptivenet", "epochs": 20}
    on_cpu = run_tiny(tmp_path / "cpu", **options)
    on_gpu = run_tiny(tmp_path / "gpu", **options, compute="cuda")
    for name in ("accuracy_before", "accuracy_after"):
        cpu, gpu = column(on_cpu, name), column(on_gpu, name)
        assert sum(gpu) / len(gpu) == pytest.approx(sum(cpu) / len(cpu), abs=0.1)
    assert column(on_gpu, "modules") == pytest.approx(column(on_cpu, "modules"), abs=3)
