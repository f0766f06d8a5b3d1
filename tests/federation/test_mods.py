"""Flower's client mods with ECLM: the same as with FedAvg, and right on real sub-models."""

import logging

import numpy as np
import pytest
from fedavg_twin import DEVICES, assert_same, eclm, fedavg
from flwr.app import ConfigRecord
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)

CLIP = 0.05


def clipping_config() -> ConfigRecord:
    return ConfigRecord({"clipping_norm": CLIP})  # what Flower's wrappers would send


def update_norm(request, answer) -> float:
    sent, returned = request.content["arrays"], answer.content["arrays"]
    assert list(sent) == list(returned)
    squares = [np.square(returned[key].numpy() - sent[key].numpy()).sum() for key in sent]
    return float(np.sqrt(sum(squares)))


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod])
def test_clipping_is_as_with_fedavg(mod):
    ours = eclm(mods=[mod], train_config=clipping_config())
    assert_same(ours, fedavg(mods=[mod], train_config=clipping_config()))
    for _, request, answer in ours.trained:
        assert update_norm(request, answer) == pytest.approx(CLIP, rel=1e-3)


def test_adaptive_clipping_reports_its_bit():
    run = eclm(mods=[adaptiveclipping_mod], train_config=clipping_config())
    assert run.result.train_metrics_clientapp[1]["norm_bit"] == 1.0  # every update was too long


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod])
def test_clipping_of_sub_models(mod):
    run = eclm(mods=[mod], modules=4, share=0.5, train_config=clipping_config())
    assert run.result.train_metrics_clientapp[1]["eclm-merged"] == DEVICES
    norms = [update_norm(request, answer) for _, request, answer in run.trained]
    assert max(norms) == pytest.approx(CLIP, rel=1e-3)  # none is longer, and some would have been


def local_dp(sensitivity: float = 0.01) -> LocalDpMod:
    return LocalDpMod(clipping_norm=CLIP, sensitivity=sensitivity, epsilon=1.0, delta=1e-5)


def test_local_differential_privacy_clips_as_with_fedavg():
    """Its noise is drawn array by array, so that the same seed gives other values here."""
    noiseless = local_dp(sensitivity=1e-12)
    assert_same(eclm(mods=[noiseless]), fedavg(mods=[noiseless]))


def test_local_differential_privacy_noises_what_a_sub_model_holds():
    run = eclm(mods=[local_dp()], modules=4, share=0.5)
    assert run.result.train_metrics_clientapp[1]["eclm-merged"] == DEVICES
    deviation = 0.01 * np.sqrt(2 * np.log(1.25 / 1e-5))
    for _, request, answer in run.trained:
        noise = np.concatenate(
            [
                (answer.content["arrays"][key].numpy() - array.numpy()).ravel()
                for key, array in request.content["arrays"].items()
            ]
        )
        # The clipped update itself is at most 0.05 long, over some hundred values.
        assert noise.std() == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize(
    ("mod", "said"),
    [(arrays_size_mod, "Total array elements sent"), (message_size_mod, "Outgoing message size")],
)
def test_size_mods_log_what_a_sub_model_weighs(mod, said):
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logging.getLogger("flwr").addHandler(handler)
    try:
        assert_same(eclm(mods=[mod]), fedavg(mods=[mod]))
        lines.clear()
        eclm(mods=[mod], modules=4, share=0.5, num_rounds=1)
    finally:
        logging.getLogger("flwr").removeHandler(handler)
    assert sum(said in line for line in lines) == DEVICES
