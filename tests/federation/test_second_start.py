"""A strategy that is started a second time, without the checkpoints of the first."""

import shutil

from federated import build_model, eclm_app, grid_of
from flwr.app import ArrayRecord

from eclm_flower import ECLM


def test_devices_known_from_an_earlier_start_are_checkpointed_before_they_are_asked_again(tmp_path):
    folder = tmp_path / "checkpoints"
    model = build_model()
    strategy = ECLM(model, checkpoint_dir=folder, fraction_evaluate=0.0)
    arrays = ArrayRecord(model.state_dict())
    strategy.start(grid_of(eclm_app()), arrays, num_rounds=1)
    shutil.rmtree(folder)
    strategy.fraction_train = 0.5  # two of the four devices it knows
    strategy.start(grid_of(eclm_app()), arrays, num_rounds=1)
    assert len(strategy.profiles) == 4
    assert len(strategy.told.budget_rounds) == 2
    resumed = ECLM(model, checkpoint_dir=folder, fraction_evaluate=0.0, fraction_train=0.5)
    resumed.start(grid_of(eclm_app()), arrays, num_rounds=1)
    assert str(resumed.profiles) == str(strategy.profiles)
