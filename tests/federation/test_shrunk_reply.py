import pytest
import torch
from federated import build_model, grid_of
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from eclm_flower import Budget, Resizable, receive, reply, selection_of
from eclm_flower.errors import RequestError
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.messages import BATCH_NORM


@pytest.mark.parametrize("gating", ["uniform", "selector"])
def test_a_reply_carries_all_that_was_received_or_is_refused(gating):
    grid_of(ClientApp())
    cloud = build_model(gating=gating)
    selection = {"0": (0, 1, 3)}
    opened = CloudModel.opened(cloud, ArrayRecord(cloud.state_dict()), version=0)
    arrays, what_it_is = opened.pack(selection)
    config = ConfigRecord({**what_it_is, BATCH_NORM: "frozen"})
    msg = Message(
        RecordDict({"arrays": arrays, "config": config}),
        dst_node_id=1,
        message_type="train",
    )

    model = receive(msg, cloud)
    resizable = Resizable(model, cloud, selection=selection_of(msg))
    flops = cloud.costs.of({"0": (0,)}).computation_flops
    resizable.shrink(Budget(computation_flops=flops))
    assert resizable.selection == {"0": (0,)}
    assert model(torch.randn(3, 12)).shape == (3, 4)
    with pytest.raises(RequestError, match=r"call grow\(\)"):
        reply(msg, model, num_examples=1)
    resizable.grow()
    answer = reply(msg, model, num_examples=1)
    returned = answer.content["arrays"]
    assert set(returned) == {"shared.float32", "modules.float32"}
    for key, array in returned.items():
        assert array.shape == arrays[key].shape
