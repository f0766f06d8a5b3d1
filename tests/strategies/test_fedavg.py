import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from eclm_flower import modularize
from eclm_flower.adaptation import DeviceProfile
from eclm_flower.federation import InProcessGrid
from eclm_flower.federation.messages import profile_to_metrics
from strategies import METHODS
from strategies.fedavg import ReproducibleFedAvg


@pytest.fixture
def app():
    app = ClientApp()

    @app.query()
    def query(msg: Message, context: Context) -> Message:
        told = DeviceProfile(device=int(context.node_config["partition-id"]))
        return Message(RecordDict({"profile": profile_to_metrics(told)}), reply_to=msg)

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        device = int(context.node_config["partition-id"])
        state = msg.content["arrays"].to_torch_state_dict()
        arrays = ArrayRecord({key: value + 0.1 * device for key, value in state.items()})
        metrics = MetricRecord({"num-examples": device + 1, "loss": float(device)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

    return app


def body():
    return nn.Linear(3, 2)


def test_with_all_devices_it_gives_the_numbers_of_flowers_own_fedavg(app):
    arrays = ArrayRecord(body().state_dict())
    ours, theirs = (
        strategy.start(InProcessGrid(app, 5), arrays, num_rounds=3)
        for strategy in (
            ReproducibleFedAvg(None, fraction_evaluate=0.0),
            FedAvg(fraction_evaluate=0.0),
        )
    )
    for key, array in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[key].numpy(), array.numpy(), rtol=1e-6)
    losses = (r.train_metrics_clientapp[3]["loss"] for r in (ours, theirs))
    assert len({round(loss, 9) for loss in losses}) == 1


def test_it_asks_the_same_devices_as_eclm(app):
    model = modularize(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        modules_per_layer=2,
        example_input=__import__("torch").zeros(1, 3),
        selector_share=1,
    )

    def asked(name):
        grid = InProcessGrid(app, 10)
        method = METHODS[name]
        strategy = method.strategy(
            model, seed=5, fraction_train=0.3, min_train_nodes=1, fraction_evaluate=0.0
        )
        strategy.configure_train(4, method.arrays(model), ConfigRecord(), grid)
        return strategy.roster.draw(3, server_round=4, purpose=0)

    assert asked("eclm") == asked("fedavg")
    assert len(asked("fedavg")) == 3
