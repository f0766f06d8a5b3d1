"""Where a block's hidden units lie, and how a module is cut out of it (section 4, exact form).

A block of hidden width H is exactly the sum of N narrow blocks of width h = H / N as long as what
stands between its two layers acts on each hidden unit alone. So a *module* is nothing but h hidden
units: the slices of the block's tensors that belong to them. All tensors stay in the layout PyTorch
wants; `ModuleLayer.packed` is a view of them with the module axis in front, ``[N, h, ...]``.

The paper starts its "shrunk" modules from scratch; cut this way, they start from the trained model.
Its "residual" module (bypass) is the skip of a residual block: always there, it costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Where a tensor's hidden units lie: along `dim` it has ``parts * H * width`` entries.

    Attributes
    ----------
    dim : int
        The tensor's axis, counted from the front.
    parts : int (default: 1)
        Stacked blocks that each have all units in order: 3 for queries, keys and values in one
        matrix.
    width : int (default: 1)
        Neighbouring entries of one unit in each part: an attention head's size, a group's channels.
    """

    dim: int
    parts: int = 1
    width: int = 1


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a family says of one block: where its hidden units are. Names are relative to the block.

    A unit is the smallest thing that can't be cut: a neuron, a channel, a head, a group.

    Parameters
    ----------
    units : int
        Hidden width H, in units.
    axes : dict[str, Axis]
        Parameter or buffer name -> where its hidden units lie.
    mixer : str
        The submodule that mixes the hidden units back. Its input is where the gates scale them.
    channel_axis : int
        Axis of the hidden units in the mixer's input: 1 for images ``[B, H, y, x]``, -1 otherwise.
    """

    units: int
    axes: Mapping[str, Axis]
    mixer: str
    channel_axis: int


@dataclass(frozen=True, kw_only=True)
class ModuleLayer:
    """A block of the cloud model, cut into equal substitutable modules (paper section 4).

    Attributes
    ----------
    name : str
        Path of the block in the model; unique.
    modules : int
        Number of modules N.
    units : int
        Hidden units H = N * h of the whole block.
    axes : dict[str, Axis]
        Model state key -> where its hidden units lie. These tensors are modular; all others shared.
    mixer : str
        Path of the submodule whose input the gates scale.
    channel_axis : int
        Axis of the hidden units in that input.
    """

    name: str
    modules: int
    units: int
    axes: Mapping[str, Axis]
    mixer: str
    channel_axis: int

    @property
    def units_per_module(self) -> int:
        """Hidden units h of one module."""
        return self.units // self.modules

    @property
    def width(self) -> int:
        """Entries of one unit in the mixer's input: channels of a group, size of a head, or 1."""
        return self.axes[f"{self.mixer}.weight"].width

    def take(self, key: str, tensor: Tensor, modules: Sequence[int]) -> Tensor:
        """Cut the chosen modules out of a whole tensor.

        Parameters
        ----------
        key : str
            State key, one of `axes`.
        tensor : Tensor
            ``[..., parts * H * width, ...]``, as ``axes[key]`` says.
        modules : sequence of int
            Chosen modules, ascending.

        Returns
        -------
        Tensor
            ``[..., parts * m * h * width, ...]``; a copy, through which gradients flow back to
            `tensor`, in the same order of memory.
        """
        chosen = torch.tensor(list(modules), device=tensor.device)
        return self._indexed(key, tensor, chosen, self.units_per_module)

    def reordered(self, key: str, tensor: Tensor, order: Tensor) -> Tensor:
        """Copy a whole tensor with its units in another order: unit j is the old ``order[j]``."""
        return self._indexed(key, tensor, order.to(tensor.device), 1)

    def packed(self, key: str, tensor: Tensor) -> Tensor:
        """View a tensor that holds m modules as ``[m, parts, h * width, ...]``, module axis first.

        It is a view: writing to it writes to `tensor`.
        """
        axis = self.axes[key]
        in_front = tensor.movedim(axis.dim, 0)
        size = self.units_per_module * axis.width
        return torch.unflatten(in_front, 0, (axis.parts, -1, size)).transpose(0, 1)

    def widened(self, key: str, tensor: Tensor, modules: Sequence[int]) -> Tensor:
        """Lay a tensor that holds the first c modules out as one that holds some of all modules.

        Parameters
        ----------
        key : str
            State key, one of `axes`.
        tensor : Tensor
            ``[..., parts * c * h * width, ...]``.
        modules : sequence of int
            Modules, ascending.

        Returns
        -------
        Tensor
            ``[..., parts * m * h * width, ...]``; zero where a module isn't among the first c.
            Gradients flow back to `tensor`.
        """
        axis = self.axes[key]
        size = self.units_per_module * axis.width
        pieces = torch.unflatten(tensor, axis.dim, (axis.parts, -1, size))
        held = [module for module in modules if module < pieces.shape[axis.dim + 1]]
        if len(held) < pieces.shape[axis.dim + 1]:
            chosen = torch.tensor(held, dtype=torch.int64, device=tensor.device)
            pieces = pieces.index_select(axis.dim + 1, chosen)
        behind = (0, 0) * (pieces.ndim - axis.dim - 2)
        padded = F.pad(pieces, (*behind, 0, len(modules) - len(held)))
        return padded.flatten(axis.dim, axis.dim + 2)

    def narrowed_shape(self, key: str, shape: Sequence[int], modules: int) -> list[int]:
        """Shape of a tensor that holds m modules, from that of the whole one."""
        axis = self.axes[key]
        narrowed = list(shape)
        narrowed[axis.dim] = axis.parts * modules * self.units_per_module * axis.width
        return narrowed

    def spread(self, gates: Tensor, ndim: int) -> Tensor:
        """Turn one gate a module, ``[B, m]``, into one an entry of the mixer's input.

        Returns
        -------
        Tensor
            ``[B, m * h * width, 1, 1]`` for images, ``[B, 1, ..., m * h * width]`` otherwise;
            `ndim` axes.
        """
        scale = gates.repeat_interleave(self.units_per_module * self.width, dim=1)
        ones = (1,) * (ndim - 2)
        batch = scale.shape[0]  # len() would tie an exported model to one batch size
        shape = (batch, -1, *ones) if self.channel_axis == 1 else (batch, *ones, -1)
        return scale.view(shape)

    def _indexed(self, key: str, tensor: Tensor, index: Tensor, units: int) -> Tensor:
        """Pick pieces of so many `units` each, by number, in every part."""
        axis = self.axes[key]
        columns = in_columns(tensor)
        dim = tensor.ndim - 1 - axis.dim if columns else axis.dim
        rows = turned(tensor) if columns else tensor
        pieces = torch.unflatten(rows, dim, (axis.parts, -1, units * axis.width))
        picked = pieces.index_select(dim + 1, index).flatten(dim, dim + 2)
        return turned(picked) if columns else picked


def layer_by_key(layers: Iterable[ModuleLayer]) -> dict[str, ModuleLayer]:
    """Return the layer of every state key that is cut into modules; what has none is shared."""
    return {key: layer for layer in layers for key in layer.axes}


def columns_of(layers: Iterable[ModuleLayer]) -> frozenset[str]:
    """State keys whose modules lie along a later axis than the first.

    A module's values are scattered in such a tensor; with the axes in memory from the last to the
    first (*in columns*, numpy's Fortran order) they lie together, as they do in all others.
    """
    return frozenset(key for layer in layers for key, axis in layer.axes.items() if axis.dim > 0)


def in_columns(tensor: Tensor) -> bool:
    """Whether a tensor's axes are in memory from the last to the first, and not as usual."""
    return not tensor.is_contiguous() and turned(tensor).is_contiguous()


def to_columns(tensor: Tensor) -> Tensor:
    """Return an equal tensor whose axes are in memory from the last to the first."""
    return turned(turned(tensor).contiguous())


def turned(tensor: Tensor) -> Tensor:
    """View a tensor with its axes in reverse order."""
    return tensor.permute(*range(tensor.ndim - 1, -1, -1))
