"""What a module costs a device: bytes on the wire, FLOPs, training memory (paper section 5.2).

The cost of a sub-model is linear in the modules it holds, so each is measured once, in the cloud,
as a difference of two sub-models that differ by a module. Measured on the meta device (shapes only,
no arithmetic), so it costs milliseconds for any family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from eclm_flower.modular.modes import evaluating
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.split import ModuleLayer

#: What the transport adds to an array (npy header, descriptions, content hashes) and to a message
#: (configuration, metrics); measured on Flower 1.41, a little generous, so that budgets hold.
ARRAY_FRAMING_BYTES = 512
MESSAGE_FRAMING_BYTES = 2048


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a part of a model, or a budget's worth of it.

    Attributes
    ----------
    communication_bytes : float
        Bytes of one transfer, one way, framing included.
    computation_flops : float
        FLOPs of a training step (forward and backward) for one sample.
    memory_bytes : float
        Peak bytes while training: parameters, gradients, one optimiser state (momentum) and the
        activations kept for the backward pass of one batch.
    """

    communication_bytes: float
    computation_flops: float
    memory_bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)}
        )

    def __mul__(self, factor: float) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) * factor for f in fields(Cost)})

    __rmul__ = __mul__


RESOURCES = tuple(field.name for field in fields(Cost))


@dataclass(frozen=True)
class CostTable:
    """Cost of the shared part and of one module of each layer; modules of a layer cost the same.

    Attributes
    ----------
    shared : Cost
        What every device pays: stem, skips, norms that span modules, head.
    per_module : dict[str, Cost]
        Layer name -> cost of one of its modules.
    modules : dict[str, int]
        Layer name -> number of modules N.
    """

    shared: Cost
    per_module: Mapping[str, Cost]
    modules: Mapping[str, int]

    def of(self, selection: Selection) -> Cost:
        """Cost of the sub-model of a selection."""
        return reduce(
            Cost.__add__,
            (self.per_module[name] * len(numbers) for name, numbers in selection.items()),
            self.shared,
        )

    @property
    def least_share(self) -> float:
        """Smallest share of the modules that pays for one in every layer, rounding included."""
        return (1 + 1e-9) * max(1 / number for number in self.modules.values())

    @property
    def whole(self) -> Cost:
        """Cost of the whole cloud model."""
        return self.of({name: range(number) for name, number in self.modules.items()})


def measure_costs(
    body: nn.Module,
    layers: Iterable[ModuleLayer],
    example_input: Tensor,
    *,
    batch_size: int = 16,
) -> CostTable:
    """Measure the cost table of a body, on the meta device.

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
    """
    layers = list(layers)

    def cost(widened: str | None = None) -> Cost:
        """Cost of one module in every layer, and two (even of one) in the widened one."""
        number = {layer.name: 2 if layer.name == widened else 1 for layer in layers}
        return _cost_of_body(body, layers, number, example_input, batch_size)

    single = cost()
    per_module = {layer.name: cost(widened=layer.name) + single * -1 for layer in layers}
    shared = reduce(Cost.__add__, (c * -1 for c in per_module.values()), single)
    return CostTable(shared, per_module, {layer.name: layer.modules for layer in layers})


def cost_of_network(network: nn.Module) -> Cost:
    """Cost of a small network that travels and is stored, but is not trained on the device."""
    tensors = network.state_dict().values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Cost(
        communication_bytes=size + ARRAY_FRAMING_BYTES * len(tensors),
        computation_flops=0,
        memory_bytes=size,
    )


def _cost_of_body(
    body: nn.Module,
    layers: list[ModuleLayer],
    number: Mapping[str, int],
    example_input: Tensor,
    batch_size: int,
) -> Cost:
    """Cost of the body with the given number of modules in each layer."""
    axes = {key: (layer, axis) for layer in layers for key, axis in layer.axes.items()}
    parameters = dict(body.named_parameters())
    state: dict[str, Tensor] = {}
    for key, tensor in {**parameters, **dict(body.named_buffers())}.items():
        shape = list(tensor.shape)
        if key in axes:
            layer, axis = axes[key]
            shape[axis] = layer.units_per_module * number[layer.name]
        state[key] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        if key in parameters and tensor.is_floating_point():
            state[key].requires_grad_()

    kept: dict[int, Tensor] = {}  # activations autograd keeps, by storage; held to keep ids unique
    own = {tensor.untyped_storage()._cdata for tensor in state.values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    def unchanged(tensor: Any) -> Any:
        return tensor

    batch = (batch_size, *example_input.shape[1:])
    x = torch.empty(batch, dtype=example_input.dtype, device="meta")
    # In eval mode batch norm uses the cloud's statistics, as on devices.
    with evaluating(body), FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, unchanged):
            output = functional_call(body, state, (x,))
        output.sum().backward()

    in_bytes = {k: t.numel() * t.element_size() for k, t in state.items()}
    trained = sum(in_bytes[key] for key in parameters)
    travelling = [key for key, tensor in state.items() if tensor.is_floating_point()]
    activations = sum(t.untyped_storage().nbytes() for t in kept.values())
    return Cost(
        communication_bytes=MESSAGE_FRAMING_BYTES
        + sum(in_bytes[key] + ARRAY_FRAMING_BYTES for key in travelling),
        computation_flops=counter.get_total_flops() // batch_size,
        memory_bytes=sum(in_bytes.values()) + 2 * trained + activations,
    )
