import pytest
import torch
from federated import build_model, grid_of
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from eclm_flower import Budget, modularize, profile, receive, reply
from eclm_flower.errors import RequestError
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.messages import BATCH_NORM, profile_from_content
from eclm_flower.federation.wire import SELECTOR_PART, flattened


@pytest.fixture(autouse=True)
def _inside_a_run():
    grid_of(ClientApp())


def context(**node_config):
    return Context(run_id=1, node_id=77, node_config=node_config, state=RecordDict(), run_config={})


def message(model, selection, *, policy="frozen", kind="train"):
    cloud = CloudModel.opened(model, ArrayRecord(model.state_dict()), version=0)
    arrays, told = cloud.pack(selection)
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({**told, BATCH_NORM: policy})})
    return Message(content, dst_node_id=1, message_type=kind)


def test_the_device_computes_what_the_cloud_sent_whatever_its_own_weights():
    cloud, device = build_model(), build_model()
    for parameter in device.parameters():
        nn.init.constant_(parameter, 7)
    x = torch.randn(5, 12)
    received = receive(message(cloud, {"0": (1, 3)}), device)
    assert type(received) is nn.Sequential
    torch.testing.assert_close(received(x), cloud.sub_model({"0": (1, 3)})(x))
    assert float(device.body[0].weight.detach().mean()) == 7  # left as it was


def test_the_reply_holds_the_keys_that_were_sent_and_the_metrics():
    cloud = build_model()
    msg = message(cloud, {"0": (0, 2)})
    answer = reply(msg, receive(msg, cloud), num_examples=9, metrics={"loss": 0.5})
    assert answer.content["arrays"].keys() == msg.content["arrays"].keys()
    assert dict(answer.content["metrics"]) == {"loss": 0.5, "num-examples": 9}
    assert not reply(msg, num_examples=9).content.array_records


@pytest.mark.parametrize("policy", ["frozen", "merged"])
def test_batch_norm_follows_the_policy_of_the_cloud(policy):
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    cloud = modularize(body, modules_per_layer=4, example_input=torch.zeros(1, 4), selector_share=1)
    received = receive(message(cloud, {"0": (0, 1)}, policy=policy), cloud).train()
    before = received[1].running_mean.clone()
    received(torch.randn(16, 4) + 3)
    assert torch.equal(received[1].running_mean, before) == (policy == "frozen")


def test_a_message_of_another_strategy_is_refused():
    content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"lr": 0.1})})
    with pytest.raises(RequestError, match="does not come from the ECLM strategy"):
        receive(Message(content, dst_node_id=1, message_type="train"), build_model())


@pytest.mark.parametrize("module", [0, 7])  # of 8, and the device's model has fewer
def test_a_message_for_another_model_is_refused(module):
    torch.manual_seed(0)
    other = modularize(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)),
        modules_per_layer=8,
        example_input=torch.zeros(1, 12),
        selector_share=1,
    )
    with pytest.raises(RequestError, match="alike in the cloud and on devices"):
        receive(message(other, {"0": (module,)}), build_model())


def test_the_profile_tells_number_and_budget_and_computes_importance_only_if_asked():
    model = build_model()

    def data():
        raise AssertionError("data was loaded")

    question = Message(RecordDict(), dst_node_id=1, message_type="query")
    answer = profile(
        question, context(**{"partition-id": 5}), model, data, budget=Budget(memory_bytes=10)
    )
    told = profile_from_content(answer.content)
    assert (told.device, told.budget.memory_bytes, told.importance) == (5, 10, {})
    assert profile_from_content(profile(question, context(), model, data).content).device == 77


@pytest.mark.parametrize("mixture", [[0.5, 0.5], [0.5, 0.6, 0.0], [float("nan"), 0.5, 0.5], []])
def test_a_mixture_that_is_none_of_the_models_sub_tasks_is_refused_on_the_device(mixture):
    question = Message(RecordDict(), dst_node_id=1, message_type="query")
    model = build_model(sub_tasks=3)
    with pytest.raises(ValueError, match="mixture of 3 proportions"):
        profile(question, context(), model, [], mixture=mixture)
    told = profile(question, context(), model, [], mixture=torch.tensor([0.25, 0.75, 0]))
    assert profile_from_content(told.content).mixture.tolist() == [0.25, 0.75, 0]


def test_importance_is_computed_with_the_selector_of_the_cloud():
    cloud, device = build_model(), build_model()
    nn.init.zeros_(device.selector.heads.weight)
    x = torch.randn(30, 12)
    selector = flattened(SELECTOR_PART, cloud.selector.state_dict())
    question = Message(
        RecordDict({"arrays": ArrayRecord(selector)}), dst_node_id=1, message_type="query"
    )
    told = profile_from_content(profile(question, context(), device, [x]).content)
    assert told.importance["0"] == pytest.approx(cloud.importance([x])["0"])
    assert told.importance["0"].std() > 0
