"""Training among a device's own classes: others get no gradient; off, nothing changes."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from unequal_federation import Settings

from strategies.heterofl import METHOD as HETEROFL
from strategies.local_training import own_classes_only, train


def data(classes: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (30,), generator=generator)
    return TensorDataset(torch.randn(30, 12, generator=generator), y)


def head_after(masked: bool, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(12, 4)
    before = model.weight.detach().clone()
    train(model, data(classes), Settings(masked_loss=masked), torch.Generator())
    return before, model.weight.detach()


def test_it_is_the_cross_entropy_of_a_smaller_head():
    logits, y = torch.randn(5, 4), torch.tensor([1, 3, 3, 1, 1])
    loss = own_classes_only(y)(logits, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, [1, 3]], y // 2))


def test_rows_of_classes_a_device_lacks_stay_and_only_then():
    before, after = head_after(masked=True)
    assert torch.equal(before[2:], after[2:])
    assert not torch.equal(before[:2], after[:2])
    before, after = head_after(masked=False)
    assert not torch.equal(before[2:], after[2:])


def test_with_all_classes_it_is_plain_cross_entropy():
    assert torch.equal(head_after(True, classes=4)[1], head_after(False, classes=4)[1])


def test_heterofl_keeps_its_own_mask():
    def adapted(masked: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(12, 4)
        HETEROFL.adapt(model, data(2), Settings(masked_loss=masked), torch.Generator())
        return model.weight.detach()

    assert torch.equal(adapted(True), adapted(False))
