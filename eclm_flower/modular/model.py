"""The modular cloud model and its sub-models (paper section 4; exact form, see `split`)."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from eclm_flower.errors import ModularizationError
from eclm_flower.modular.cost_measurement import measure_costs
from eclm_flower.modular.costs import CostTable
from eclm_flower.modular.deltas import DeltaModules
from eclm_flower.modular.families import registered
from eclm_flower.modular.gating import gated
from eclm_flower.modular.module_layers import find_module_layers
from eclm_flower.modular.selection import Selection, checked, numbers, whole
from eclm_flower.modular.selector import DELTAS, ModuleSelector, build_selector, top_k_gates
from eclm_flower.modular.shape_driven import make_shape_driven, match_sizes
from eclm_flower.modular.split import ModuleLayer

Gating = Literal["uniform", "selector"]


class ModularModel(nn.Module):
    """A model whose blocks are cut into modules, with a selector that scores them.

    Its state is the state of the user's own model under ``body.``, the selector's under
    ``selector.``, and that of delta modules, if it has any, under ``deltas.``: nothing is renamed
    or reshaped. Build it with `modularize`.

    Attributes
    ----------
    body : nn.Module
        The user's model. In a sub-model, its blocks are as narrow as the modules held.
    selector : ModuleSelector
        Scores all N modules of every layer, whatever the model holds.
    sub_tasks : int
        Number of sub-tasks S that the selector tells apart for delta modules; 0: it does not.
    deltas : DeltaModules or None
        Differences of the sub-tasks, in a cloud model that has some; see `add_deltas`.
    layers : dict[str, ModuleLayer]
        The module layers of the WHOLE cloud model, by name.
    selection : dict[str, tuple[int, ...]]
        The modules this model holds; all of them in the cloud model.
    gating : "uniform" or "selector"
        ``"uniform"``: every module held has gate 1, the output is the body's. ``"selector"`` (the
        paper's): each input weighs the modules held by the selector's top-k gates.
    top_k : int or None
        Modules an input uses in a layer under ``gating="selector"``; None: all that are held.
    batch_size : int
        Batch on devices whose activations count as memory in `costs`.
    costs : CostTable
        What each module and the shared part cost. Computed when first asked for.
    """

    def __init__(
        self,
        body: nn.Module,
        selector: ModuleSelector,
        layers: Iterable[ModuleLayer],
        example_input: Tensor,
        *,
        gating: Gating = "uniform",
        top_k: int | None = None,
        batch_size: int = 16,
        selection: Selection | None = None,
    ) -> None:
        super().__init__()
        self.training = body.training
        self.body = body
        self.selector = selector
        self.sub_tasks = selector.sizes.get(DELTAS, 0)
        self.deltas: DeltaModules | None = None
        self.layers = {layer.name: layer for layer in layers}
        self.selection = checked(
            selection or whole(self.layers.values()), numbers(self.layers.values())
        )
        self.gating: Gating = gating
        self.top_k = top_k
        self.batch_size = batch_size
        self.example_input = example_input
        self._costs: CostTable | None = None

    def add_deltas(self) -> DeltaModules:
        """Give a cloud model delta modules, zero at first, in place of any it has.

        Raises
        ------
        ModularizationError
            It was not modularised with sub-tasks.
        """
        if self.sub_tasks == 0:
            raise ModularizationError(
                "Expected a model of some sub-tasks for delta modules: modularize(..., "
                "sub_tasks=S), with the same S in the cloud and on devices."
            )
        self.deltas = DeltaModules(self.body, self.layers.values(), self.sub_tasks)
        return self.deltas

    def add_deltas_of(self, keys: Iterable[str]) -> None:
        """Add delta modules if a state with these keys has some and this model has none."""
        if self.deltas is None and any(key.startswith("deltas.") for key in keys):
            self.add_deltas()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load a state, as in PyTorch; delta modules in it are added where there are none yet."""
        self.add_deltas_of(state_dict)
        loaded = super().load_state_dict(state_dict, strict=strict, assign=assign)
        return cast(_IncompatibleKeys, loaded)

    @property
    def costs(self) -> CostTable:
        """What each module and the shared part cost on a device."""
        if self._costs is None:
            self._costs = measure_costs(
                self.body,
                self.layers.values(),
                self.example_input,
                batch_size=self.batch_size,
                selector=self.selector if self.gating == "selector" else None,
            )
        return self._costs

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``[B, ...]`` to the body's outputs, gated as `gating` says."""
        if self.gating == "uniform":
            return cast(Tensor, self.body(x))
        return self.forward_gated(x, self.gates(self.selector(x)))

    def gates(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn the selector's logits ``[B, N]`` into gates ``[B, m]`` of the modules held.

        Gates are scaled to a mean of 1 over the modules used: with equal scores and no `top_k` they
        are all 1, and the model computes what it computed before it was cut.
        """
        result = {}
        for name, held in self.selection.items():
            gates = top_k_gates(logits[name][:, list(held)], self.top_k)
            result[name] = gates * min(self.top_k or len(held), len(held))
        return result

    def forward_gated(self, x: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """Compute ``f(x) = sum_i g(x)_i f_i(x)`` in every layer (paper section 4.1).

        Parameters
        ----------
        x : Tensor
            Inputs ``[B, ...]``.
        gates : dict[str, Tensor]
            Layer name -> gates ``[B, m]`` (or ``[1, m]``, equal for all inputs) of the modules
            held. Layers left out have gates of 1.
        """
        with gated(self.body, self.layers, gates):
            return cast(Tensor, self.body(x))

    @torch.no_grad()
    def importance(self, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> dict[str, np.ndarray]:
        """Score the modules for some data: the mean gate over its samples (paper section 5.1).

        Parameters
        ----------
        batches : iterable of Tensor or tuple
            Inputs ``[B, ...]``, or tuples that start with them (a DataLoader). From a loader of
            dictionaries: ``(batch["img"] for batch in loader)``.

        Returns
        -------
        dict[str, np.ndarray]
            Layer name -> float64 ``[N]``, sums to 1; the delta modules' under `DELTAS`.
        """
        total: dict[str, Tensor] = {}
        samples = 0
        for batch in batches:
            x = batch if isinstance(batch, Tensor) else batch[0]
            for name, logits in self.selector(x).items():
                gates = top_k_gates(logits).double().sum(dim=0)
                total[name] = total[name] + gates if name in total else gates
            samples += len(x)
        if samples == 0:
            raise ValueError("Expected at least one sample to compute importance from, got none.")
        return {name: (gates / samples).cpu().numpy() for name, gates in total.items()}

    def narrowed_state(self, selection: Selection) -> dict[str, Tensor]:
        """Cut a sub-model's tensors out of the body's, keyed as in the body.

        Gradients flow back to the body, so a sub-model can be trained in place with
        ``torch.func.functional_call(model.body, model.narrowed_state(selection), (x,))``.
        """
        state = {**dict(self.body.named_parameters()), **dict(self.body.named_buffers())}
        for layer in self.layers.values():
            if len(selection[layer.name]) < layer.modules:
                for key in layer.axes:
                    state[key] = layer.take(key, state[key], selection[layer.name])
        return state

    def sub_model(self, selection: Selection) -> nn.Module:
        """Build the sub-model of a selection, with tensors of its own.

        Parameters
        ----------
        selection : dict[str, sequence of int]
            Layer name -> module numbers.

        Returns
        -------
        nn.Module
            A plain module of the body's type with narrower blocks; under ``gating="selector"`` a
            `ModularModel` around it, because its gates need the selector.

        Raises
        ------
        SelectionError
            The selection names what does not exist or leaves a layer empty.
        """
        selection = checked(selection, numbers(self.layers.values()))
        with torch.no_grad():
            narrowed = self.narrowed_state(selection)
        own = [key for layer in self.layers.values() for key in layer.axes]
        memo: dict[int, Any] = {}  # tensors that will be replaced are not copied first
        for key in own:
            owner, _, name = key.rpartition(".")
            tensor = getattr(self.body.get_submodule(owner), name)
            memo[id(tensor)] = tensor
        for part in self.body.modules():  # a module has a dozen dicts of hooks: most of the time
            for value in vars(part).values():
                if type(value) is OrderedDict and not value:
                    memo[id(value)] = OrderedDict()
        body = copy.deepcopy(self.body, memo)
        for key in own:
            owner, _, name = key.rpartition(".")
            module = body.get_submodule(owner)
            old = getattr(module, name)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(narrowed[key].detach().clone(), requires_grad=old.requires_grad)
                setattr(module, name, new)
            else:
                setattr(module, name, narrowed[key].detach().clone())
        for owner in {key.rpartition(".")[0] for key in own}:
            match_sizes(body.get_submodule(owner))
        if self.gating == "uniform":
            return body
        return ModularModel(
            body,
            copy.deepcopy(self.selector).requires_grad_(False),  # devices don't train it
            self.layers.values(),
            self.example_input,
            gating=self.gating,
            top_k=self.top_k,
            batch_size=self.batch_size,
            selection=selection,
        )

    @torch.no_grad()
    def regroup(self, layer_name: str, order: Tensor) -> None:
        """Reorder a block's hidden units, and so choose which share a module.

        What the body computes doesn't change; the selector's scores stay with the module numbers.

        Parameters
        ----------
        layer_name : str
            The module layer.
        order : Tensor
            int64 ``[H]``, a permutation: the new unit j is the old unit ``order[j]``; module i
            holds the new units i * h to (i + 1) * h - 1.
        """
        layer = self.layers[layer_name]
        if sorted(order.tolist()) != list(range(layer.units)):
            raise ValueError(f"Expected a permutation of {layer.units} hidden units.")
        state = self.body.state_dict()  # shares storage with the model
        for key in layer.axes:
            state[key].copy_(layer.reordered(key, state[key], order))


def body_of(sub_model: nn.Module) -> nn.Module:
    """Return what of a sub-model is the user's own: all but the selector, if it has one."""
    return sub_model.body if isinstance(sub_model, ModularModel) else sub_model


def modularize(
    model: nn.Module,
    *,
    modules_per_layer: int = 16,
    example_input: Tensor,
    keep_whole: bool = False,
    selector_share: float = 0.02,
    sub_tasks: int = 0,
    gating: Gating = "uniform",
    top_k: int | None = None,
    batch_size: int = 16,
) -> ModularModel:
    """Cut a model into modules without changing what it computes.

    Parameters
    ----------
    model : nn.Module
        The cloud model, trained or not. It becomes the `body` of the result, not a copy; layers
        that count groups or heads become subclasses that read them from their tensors' shapes.
    modules_per_layer : int (default: 16)
        Most modules N a block is cut into (paper: 16 for ResNet18 and the MLP). A block gets the
        largest number up to this that divides its hidden units (12 heads: 12 modules); one with no
        such number but 1 stays whole. ``result.layers`` says what each block got.
    example_input : Tensor
        One input, ``[1, ...]``; only its shape and dtype matter.
    keep_whole : bool (default: False)
        Keep blocks whole whose hidden units can't be told apart (a squeeze-and-excite among them),
        as part of what every device holds, instead of refusing the model.
    selector_share : float (default: 0.02)
        Most bytes the selector may take, as a share of the model's.
    sub_tasks : int (default: 0)
        Number of sub-tasks S that may get delta modules (`eclm_flower.modular.deltas`); the
        selector then tells them apart, too. The same S in the cloud and on devices; 0: none. Those
        that the proxy data lacks are for environments to come: only devices fill them.
        Not in the paper.
    gating : {"uniform", "selector"}, default "uniform"
        How a sub-model weighs the modules it holds; see `ModularModel`. The paper's is "selector";
        in our trials the gates of a small selector cost a good model more than they gave.
    top_k : int, optional
        Modules an input uses in a layer under ``gating="selector"``. Paper: not stated.
    batch_size : int (default: 16)
        Batch on devices, whose activations count as memory (paper: 16).

    Raises
    ------
    ModularizationError
        No block of a known family was found, or none can be cut as asked.
    CoupledUnitsError
        A block has no exact split, and `keep_whole` is False.
    """
    if example_input.ndim < 2 or len(example_input) != 1:
        raise ModularizationError(
            f"Expected example_input of one sample, [1, ...], got {list(example_input.shape)}."
        )
    if modules_per_layer < 1:
        raise ModularizationError(f"Expected modules_per_layer >= 1, got {modules_per_layer}.")
    if top_k is not None and not 1 <= top_k <= modules_per_layer:
        raise ModularizationError(
            f"Expected top_k from 1 to modules_per_layer = {modules_per_layer}, got {top_k}."
        )
    if sub_tasks < 0 or (sub_tasks and gating == "selector"):
        raise ModularizationError(
            f"Expected sub_tasks of at least 0, and 0 with gating 'selector', got {sub_tasks}."
        )
    layers = list(find_module_layers(model, modules_per_layer, keep_whole=keep_whole))
    if not layers:
        raise ModularizationError(
            f"Found no block to cut into 2 to {modules_per_layer} modules in "
            f"{type(model).__name__}. Known blocks: {registered()}; register yours with "
            "eclm_flower.modular.families.register."
        )
    make_shape_driven(model)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    selector = build_selector(
        example_input,
        layers,
        model_bytes=model_bytes,
        share=selector_share,
        sub_tasks=sub_tasks,
    )
    return ModularModel(
        model,
        selector.to(example_input.device),
        layers,
        example_input,
        gating=gating,
        top_k=top_k,
        batch_size=batch_size,
    )
