import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord
from unequal_federation import app_for, build_model, grid_of, local_data, run

from eclm_flower.federation.client import selection_of
from strategies import METHODS, clusters

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


@torch.no_grad()
def test_a_device_takes_the_cluster_of_least_loss():
    model = build_model()
    bodies = clusters.ClusteredModel(model).body
    x, y = local_data(0).tensors
    for body, shift in zip(bodies, (3.0, 0.0, 1.0, 2.0), strict=True):
        body[9].bias[y.unique()] -= shift
    METHODS["clusters"].select(bodies, local_data(0), torch.Generator())
    losses = [float(F.cross_entropy(body.eval()(x), y)) for body in bodies]
    assert bodies.chosen == int(np.argmin(losses)) == 1
    assert torch.equal(bodies(x), bodies[1](x))


def test_the_state_is_the_clusters_bodies_and_one_selector():
    model = build_model()
    clustered = clusters.ClusteredModel(model)
    bodies = {
        f"body.{c}.{key}" for c in range(clusters.CLUSTERS) for key in model.body.state_dict()
    }
    selector = {f"selector.{key}" for key in model.selector.state_dict()}
    assert clustered.state_dict().keys() == bodies | selector
    assert clustered.costs.whole == model.costs.whole * clusters.CLUSTERS


def test_while_models_are_equal_devices_spread_over_them():
    bodies = clusters.ClusteredModel(build_model()).body
    chosen = set()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        METHODS["clusters"].select(bodies, local_data(0), generator)
        chosen.add(bodies.chosen)
    assert chosen == set(range(clusters.CLUSTERS))


def test_a_cluster_is_merged_from_the_devices_that_chose_it_alone():
    method, chosen = METHODS["clusters"], {}
    app = app_for(method, opened=lambda device, own: chosen.setdefault(device, own.chosen))
    _, result = run(method, rounds=1, app=app, fraction_evaluate=0.0)
    before = method.arrays(build_model())
    trained = set(chosen.values())
    assert len(trained) > 1
    for cluster in range(clusters.CLUSTERS):
        keys = [key for key in before if key.startswith(f"body.{cluster}.")]
        moved = any(result.arrays[key].data != before[key].data for key in keys)
        assert moved == (cluster in trained)


def test_a_device_tries_all_models_and_returns_one():
    method, sent = METHODS["clusters"], []
    app = app_for(method, seen=sent)
    answers = []
    train = app._registered_funcs["train.default"]

    def spy(msg, context):
        answers.append(train(msg, context))
        return answers[-1]

    app._registered_funcs["train.default"] = spy
    strategy = method.strategy(build_model())
    arrays, grid = method.arrays(build_model()), grid_of(app)
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    list(grid.send_and_receive(messages))
    for message, answer in zip(messages, answers, strict=True):
        sent, returned = message.content["arrays"], answer.content["arrays"]
        assert sent.keys() == returned.keys()
        for key, array in returned.items():
            assert sent[key].shape[0] == clusters.CLUSTERS * array.shape[0]
        held = selection_of(message)
        assert held["0.0"] == held["3.0"]


def test_a_reply_that_names_no_cluster_moves_nothing():
    method = METHODS["clusters"]
    app = app_for(method)
    train = app._registered_funcs["train.default"]

    def lying(msg, context):
        answer = train(msg, context)
        answer.content["metrics"]["cluster"] = 17
        return answer

    app._registered_funcs["train.default"] = lying
    _, result = run(method, rounds=1, app=app)
    assert not result.arrays
    metrics = result.train_metrics_clientapp[1]
    assert metrics["eclm-refused-shape"] == metrics["eclm-asked"] > 0
