"""A device's class prior: how often it has each class, told to its logits (not in the paper).

Where devices differ by how often they have each class, the best answer of one and the same model
differs by a constant per class: a device that has class c in a share w_c of its data, of a model
trained where c has the share p_c, best adds

    log((1 - u) w_c / p_c + u)

to the logit of c (Saerens, Latinne, Decaestecker, Neural Computation 2002; as a loss: Menon et al.,
ICLR 2021). u is a small chance that a sample is of the cloud's classes instead. What the device
then trains is not its shares of classes over again, and what it returns, prior taken off, does not
tell the cloud to forget the classes that it lacks. The shares never leave the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eclm_flower.modular.model import body_of


@contextmanager
def class_prior(
    model: nn.Module,
    labels: Tensor | Sequence[int],
    *,
    cloud_shares: Tensor | Sequence[float] | None = None,
    unlike: float = 0.05,
) -> Iterator[None]:
    """Let a model know how often this device has each class, until the block ends.

    ::

        sub_model = receive(msg, model)
        with class_prior(sub_model, labels):
            loss = my_training_loop(sub_model, loader)
        return reply(msg, sub_model, num_examples=len(labels), metrics={"loss": loss})

    Train, test and use the model inside. What training changed of the bias remains, the prior does
    not; entries that training left alone are as before, bit for bit.

    Parameters
    ----------
    model : nn.Module
        What `receive` returned, or any network whose last parameter is the bias of its logits.
    labels : Tensor or sequence of int
        ``[n]``, at least one: of the device's data.
    cloud_shares : Tensor or sequence of float, optional
        ``[C]``, above 0: of the classes in the cloud's data; by default all alike.
    unlike : float (default: 0.05)
        u: chance that a sample is not as the device's data so far; above 0. The smaller, the less
        the device expects of classes that it lacks.

    Raises
    ------
    ValueError
        The model ends in no bias of its logits, or the labels or shares don't fit it.
    """
    name, bias = list(body_of(model).named_parameters())[-1]
    if bias.ndim != 1:
        raise ValueError(
            f"Expected a model whose last parameter is the bias of its logits, got {name} "
            f"{list(bias.shape)}; give its last layer a bias."
        )
    prior = log_prior(labels, len(bias), cloud_shares=cloud_shares, unlike=unlike).to(bias)
    with torch.no_grad():
        alone = bias.clone()
        given = bias.add_(prior).clone()
    try:
        yield
    finally:
        with torch.no_grad():
            bias.copy_(torch.where(bias == given, alone, bias - prior))


def log_prior(
    labels: Tensor | Sequence[int],
    classes: int,
    *,
    cloud_shares: Tensor | Sequence[float] | None = None,
    unlike: float = 0.05,
) -> Tensor:
    """Return what a device's labels add to the logits: float64 ``[C]``; see `class_prior`."""
    labels = torch.as_tensor(labels).long().cpu()
    if labels.ndim != 1 or len(labels) == 0 or int(labels.min()) < 0:
        least = f", the least {int(labels.min())}" if labels.numel() else ""
        raise ValueError(
            f"Expected at least one label, all from 0, as [n], got {list(labels.shape)}{least}."
        )
    if int(labels.max()) >= classes:
        raise ValueError(
            f"Expected labels below {classes}, the length of the model's last parameter, got "
            f"{int(labels.max())}: is it the bias of its logits?"
        )
    shares = torch.full((classes,), 1 / classes, dtype=torch.float64)
    if cloud_shares is not None:
        shares = torch.as_tensor(cloud_shares, dtype=torch.float64).cpu()
    if shares.shape != (classes,) or not bool((shares > 0).all()):
        raise ValueError(f"Expected cloud_shares of {classes} classes, all above 0, got {shares}.")
    if not 0 < unlike < 1:
        raise ValueError(f"Expected unlike between 0 and 1, got {unlike}.")
    own = torch.bincount(labels, minlength=classes).double() / len(labels)
    return torch.log((1 - unlike) * own / (shares / shares.sum()) + unlike)
