"""Benchmarks are programs: what they set for their process must not outlive a test."""

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def _restored():
    level, threads = logging.getLogger("flwr").level, torch.get_num_threads()
    yield
    logging.getLogger("flwr").setLevel(level)
    torch.set_num_threads(threads)
