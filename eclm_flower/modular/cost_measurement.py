"""Measuring what each module costs, once, in the cloud.

The cost of a sub-model is linear in the modules it holds, so a module's is the difference of two
sub-models that differ by it. Measured on the meta device (shapes only, no arithmetic), and once for
layers that look alike; that they are alike is checked on a model in which all are wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from eclm_flower.modular.costs import Cost, CostTable
from eclm_flower.modular.gating import gated
from eclm_flower.modular.modes import evaluating
from eclm_flower.modular.real_device import FLOP_FORMULAS, FusedAttention
from eclm_flower.modular.split import ModuleLayer, layer_by_key

_MESSAGE, _ARRAY, _LAYER, _CHUNK = 2048, 512, 256, 128  # bytes
_CHUNK_BYTES = 5e6  # Flower cuts arrays into chunks of this size


def framing_bytes(*, layers: int, arrays: int, whole_bytes: int) -> int:
    """Bytes that the transport adds to a sub-model, at most; measured on Flower 1.41.

    A little generous (it hardly depends on what is chosen), so that budgets hold.

    Parameters
    ----------
    layers : int
        Module layers: the message says which modules of each it carries.
    arrays : int
        Arrays that the tensors travel in: shared part, modules, and the selector if it gates.
    whole_bytes : int
        What all tensors of the cloud model take: arrays travel in chunks.
    """
    chunks = math.ceil(whole_bytes / _CHUNK_BYTES)
    return _MESSAGE + _ARRAY * arrays + _LAYER * layers + _CHUNK * chunks


def measure_costs(
    body: nn.Module,
    layers: Iterable[ModuleLayer],
    example_input: Tensor,
    *,
    batch_size: int = 16,
    selector: nn.Module | None = None,
) -> CostTable:
    """Measure the cost table of a body.

    Parameters
    ----------
    body : nn.Module
        The whole cloud model's body.
    layers : iterable of ModuleLayer
        Its module layers.
    example_input : Tensor
        One input, ``[1, ...]``.
    batch_size : int (default: 16)
        Batch whose activations count as memory (paper: 16).
    selector : ModuleSelector, optional
        If it gates every forward pass, and so travels with every sub-model, frozen.
    """
    device = _Device(body, list(layers), example_input, batch_size, selector)
    single, shapes = device.cost()
    alike: dict[Any, Cost] = {}
    per_module = {}
    for layer in device.layers:
        look = (
            shapes[layer.name],
            *((axis, device.whole[key].shape) for key, axis in layer.axes.items()),
        )
        if look not in alike:
            alike[look] = device.cost([layer.name])[0] + single * -1
        per_module[layer.name] = alike[look]
    wider, _ = device.cost([layer.name for layer in device.layers])
    if reduce(Cost.__add__, per_module.values(), single) != wider:  # some only looked alike
        per_module = {name: device.cost([name])[0] + single * -1 for name in per_module}
    shared = reduce(Cost.__add__, (c * -1 for c in per_module.values()), single)
    modules = {layer.name: layer.modules for layer in device.layers}
    return CostTable(shared, per_module, modules, batch_size, device.framing_bytes)


class _Device:
    """A training step on a device that has no memory and computes nothing, and is measured."""

    def __init__(
        self,
        body: nn.Module,
        layers: list[ModuleLayer],
        example_input: Tensor,
        batch_size: int,
        selector: nn.Module | None,
    ) -> None:
        self.body, self.layers, self.selector = body, layers, selector
        self.batch_size = batch_size
        self.whole = {**dict(body.named_parameters()), **dict(body.named_buffers())}
        modular = layer_by_key(layers).keys()
        arrays = {(k in modular, t.dtype) for k, t in self.whole.items() if t.is_floating_point()}
        self.framing_bytes = framing_bytes(
            layers=len(layers),
            arrays=len(arrays) + (selector is not None),
            whole_bytes=sum(tensor.nbytes for tensor in self.whole.values()),
        )
        batch = (batch_size, *example_input.shape[1:])
        self.x = torch.empty(batch, dtype=example_input.dtype, device="meta")

    def cost(self, widened: Iterable[str] = ()) -> tuple[Cost, dict[str, torch.Size]]:
        """Measure a model of one module in every layer, and two (even of one) in the widened ones.

        Returns
        -------
        tuple[Cost, dict[str, torch.Size]]
            The cost, and the shape of each layer's hidden units.
        """
        number = {layer.name: 2 if layer.name in widened else 1 for layer in self.layers}
        state = self._narrowed(number)
        frozen = {} if self.selector is None else _on_meta(self.selector.state_dict())
        own = {t.untyped_storage()._cdata for t in (*state.values(), *frozen.values())}
        kept: dict[int, Tensor] = {}  # by storage, and held so that no storage takes its number

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in own:
                kept[storage] = tensor
            return tensor

        def unchanged(tensor: Any) -> Any:
            return tensor

        counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
        saving = torch.autograd.graph.saved_tensors_hooks(keep, unchanged)
        with self._hidden_shapes() as shapes, _in_training(self.body), counter:
            with self._gates(frozen, number), FusedAttention(), saving:
                output = functional_call(self.body, state, (self.x,))
            forward = counter.get_total_flops()
            if output.requires_grad:
                output.sum().backward()

        travelling = [t for t in (*state.values(), *frozen.values()) if t.is_floating_point()]
        trained = sum(tensor.nbytes for tensor in state.values() if tensor.requires_grad)
        cost = Cost(
            communication_bytes=self.framing_bytes + sum(tensor.nbytes for tensor in travelling),
            computation_flops=counter.get_total_flops() // self.batch_size,
            memory_bytes=sum(tensor.nbytes for tensor in (*state.values(), *frozen.values()))
            + 2 * trained
            + sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
            forward_flops=forward // self.batch_size,
        )
        return cost, shapes

    def _narrowed(self, number: Mapping[str, int]) -> dict[str, Tensor]:
        layer_of = layer_by_key(self.layers)
        state = {}
        for key, tensor in self.whole.items():
            shape = list(tensor.shape)
            if key in layer_of:
                layer = layer_of[key]
                shape = layer.narrowed_shape(key, shape, number[layer.name])
            state[key] = torch.empty(shape, dtype=tensor.dtype, device="meta")
            state[key].requires_grad_(tensor.requires_grad)
        return state

    @contextmanager
    def _gates(self, frozen: dict[str, Tensor], number: Mapping[str, int]) -> Iterator[None]:
        if self.selector is None:
            yield
            return
        with torch.no_grad():
            logits = functional_call(self.selector, frozen, (self.x,))
            gates = {name: logits[name][:, :n].softmax(dim=1) for name, n in number.items()}
        with gated(self.body, {layer.name: layer for layer in self.layers}, gates):
            yield

    @contextmanager
    def _hidden_shapes(self) -> Iterator[dict[str, torch.Size]]:
        shapes: dict[str, torch.Size] = {}
        handles = []
        for layer in self.layers:

            def record(_: nn.Module, inputs: tuple[Tensor, ...], name: str = layer.name) -> None:
                shapes[name] = inputs[0].shape

            handles.append(self.body.get_submodule(layer.mixer).register_forward_pre_hook(record))
        try:
            yield shapes
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _in_training(body: nn.Module) -> Iterator[None]:
    """Train mode, but batch norm uses the cloud's statistics, as on devices."""
    with evaluating(body):
        for layer in body.modules():
            if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.training = True
        yield


def _on_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.empty_like(tensor, device="meta") for key, tensor in state.items()}
