"""Every choice of the offline stage, with its default and the reason for it.

"Paper" is what the ECLM / Nebula paper states; most of these it leaves open (its section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from eclm_flower.errors import PrototypingError
from eclm_flower.prototyping.grouping import Grouping

Method = Literal["deployed", "paper"]


@dataclass(frozen=True, kw_only=True)
class PrototypingConfig:
    """Parameters of `prototype`.

    Attributes
    ----------
    method : {"deployed", "paper"}, default "deployed"
        ``"paper"``: end-to-end training with noisy top-k gates, then ability enhancing by a KL
        term; needs ``modularize(..., gating="selector")``. ``"deployed"``: train the whole model,
        group its units, train the selector by the same KL, then train sub-models as devices will
        hold them; needs ``gating="uniform"``. In our trials the last step mattered most.
    seed : int (default: 0)
        Of batches, augmentation, clustering, noise and simulated devices.
    batch_size : int (default: 64)
    epochs : int (default: 14)
        Epochs of training the whole model; 0 if it comes trained. Paper: not stated.
    learning_rate : float (default: 0.08)
        Peak of that training: SGD, Nesterov momentum 0.9, warm-up over the first tenth, then
        cosine to zero. Paper: optimiser not stated.
    weight_decay : float (default: 5e-4)
    clip_norm : float (default: 2.0)
        Gradients are clipped to this norm; pre-norm nets without warm statistics need it.
    grouping : {"clustered", "contiguous"}, default "clustered"
        Which hidden units share a module; see `grouping.order_units`. Not in the paper, whose
        modules start from scratch. Ignored by ``method="paper"``.
    core_modules : int, optional
        Modules of each layer that every sub-task uses; the others are chosen by the selector. None
        (default): all of them, so that sub-models are nested and sub-tasks differ by delta modules
        alone; in our trials small sub-models lost more by choosing than they gained. Not in the
        paper (0). Ignored by ``method="paper"``.
    order_decay : float (default: 0.25)
        With nested sub-models: the gate of a module is so much less, in logarithm, than that of the
        one before. Steeper makes all layers equally wide, flatter lets cheap layers be wider.
    core_share : float (default: 0.5)
        Share of the gate targets that the core gets: enough to rank it first for everyone.
    sub_tasks_per_module : int, optional
        kappa1 of the assignment program. Paper: not stated; None takes the least with which all
        sub-tasks can have `modules_per_sub_task`.
    modules_per_sub_task : int (default: 6)
        kappa2, core included. Paper: not stated; about what a 37 % sub-model holds of 16.
    smoothing : float (default: 0.1)
        Share of the gate targets spread over all modules by load: orders what comes after the
        assigned ones. 0 in the paper.
    selector_epochs : int (default: 12)
    selector_learning_rate : float (default: 2e-3)
        Adam, for the selector alone (``method="deployed"``); it is then frozen.
    enhancing_epochs : int (default: 9)
        Epochs of the last stage: sub-models as deployed, or the paper's ability enhancing.
    enhancing_learning_rate : float (default: 0.025)
        Peak, same schedule.
    delta_share : float (default: 0.33)
        Share of `enhancing_epochs`, rounded, in which not sub-models but delta modules train, the
        last of them. 0: the model gets no delta modules. Not in the paper.
    delta_rate : float (default: 1.0)
        Peak of their learning rate, as a multiple of `enhancing_learning_rate`.
    delta_scales : tuple[float, ...] (default: (0, 0.5, 1))
        Of these, delta modules are multiplied by what makes sub-models as deployed most accurate on
        proxy data that was held out, sub-tasks inferred; the most cautious first. 0: what
        they hold comes from devices alone.
    held_out : float (default: 0.1)
        Share of the proxy data held out for that: the last samples of each sub-task. They train the
        whole model, but no sub-model; all of them train without delta modules.
    kl_weight : float (default: 1.0)
        lambda of the KL term in ability enhancing (``method="paper"``). Paper: not stated.
    balance_weight : float (default: 0.01)
        lambda of load balancing (``method="paper"``). Paper: not stated; Shazeer et al. use 0.01
        to 0.1.
    gate_noise : float (default: 1.0)
        Noise on the logits at the start, falling linearly to zero (``method="paper"``).
    devices_per_step : int (default: 3)
    samples_per_device : int (default: 32)
        Simulated devices in a step of ``method="deployed"`` and the batch of each. Twice the 16 of
        the paper's devices gave delta modules 1 to 2 points in our trials.
    whole_samples : int (default: 32)
        Samples of all sub-tasks on which the whole model keeps training in each of these steps, so
        that it does not pay for its sub-models.
    sub_tasks_per_device : tuple[int, int] (default: (1, 2))
        Least and most sub-tasks a simulated device sees: set it to what real devices see.
    budget_shares : tuple[float, ...] (default: (0.125, 0.25, 0.5))
        Share of the modules that simulated devices can hold, taken in turn: set it to what real
        devices can hold. A budget smaller than any of these will be served badly.
    distillation : float (default: 0)
        Weight of the whole model's soft labels while sub-models train (``method="deployed"``). At
        0.5 it gained nothing, but right after a device's classes move (docs/evidence.md).
    temperature : float (default: 2.0)
        Of those soft labels.
    """

    method: Method = "deployed"
    seed: int = 0
    batch_size: int = 64
    epochs: int = 14
    learning_rate: float = 0.08
    weight_decay: float = 5e-4
    clip_norm: float = 2.0
    grouping: Grouping = "clustered"
    core_modules: int | None = None
    order_decay: float = 0.25
    core_share: float = 0.5
    sub_tasks_per_module: int | None = None
    modules_per_sub_task: int = 6
    smoothing: float = 0.1
    selector_epochs: int = 12
    selector_learning_rate: float = 2e-3
    enhancing_epochs: int = 9
    enhancing_learning_rate: float = 0.025
    delta_share: float = 0.33
    delta_rate: float = 1.0
    delta_scales: tuple[float, ...] = (0.0, 0.5, 1.0)
    held_out: float = 0.1
    kl_weight: float = 1.0
    balance_weight: float = 0.01
    gate_noise: float = 1.0
    devices_per_step: int = 3
    samples_per_device: int = 32
    whole_samples: int = 32
    sub_tasks_per_device: tuple[int, int] = (1, 2)
    budget_shares: tuple[float, ...] = (0.125, 0.25, 0.5)
    distillation: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise PrototypingError(f"Expected method from {get_args(Method)}, got {self.method!r}.")
        if self.grouping not in get_args(Grouping):
            raise PrototypingError(
                f"Expected grouping from {get_args(Grouping)}, got {self.grouping!r}."
            )
        positive = (
            "batch_size",
            "devices_per_step",
            "samples_per_device",
            "whole_samples",
            "modules_per_sub_task",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise PrototypingError(f"Expected {name} >= 1, got {getattr(self, name)}.")
        for name in (
            "epochs",
            "selector_epochs",
            "enhancing_epochs",
            "core_modules",
            "gate_noise",
            "order_decay",
            "delta_rate",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise PrototypingError(f"Expected {name} >= 0, got {getattr(self, name)}.")
        for name in ("core_share", "smoothing", "distillation", "delta_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise PrototypingError(f"Expected {name} from 0 to 1, got {getattr(self, name)}.")
        if not 0 < self.held_out < 1:
            raise PrototypingError(f"Expected held_out between 0 and 1, got {self.held_out}.")
        if not self.delta_scales or not all(0 <= scale <= 1 for scale in self.delta_scales):
            raise PrototypingError(f"Expected delta_scales in [0, 1], got {self.delta_scales}.")
        least, most = self.sub_tasks_per_device
        if not 1 <= least <= most:
            raise PrototypingError(
                f"Expected sub_tasks_per_device as (least, most), got {self.sub_tasks_per_device}."
            )
        if not self.budget_shares or not all(0 < share <= 1 for share in self.budget_shares):
            raise PrototypingError(f"Expected budget_shares in (0, 1], got {self.budget_shares}.")

    @property
    def delta_epochs(self) -> int:
        """Epochs of training delta modules; none where they may only be multiplied by 0."""
        return round(self.delta_share * self.enhancing_epochs) if any(self.delta_scales) else 0
