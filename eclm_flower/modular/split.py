"""Where a block's hidden units lie, and how a module is cut out of it (section 4, exact form).

A block of hidden width H is exactly the sum of N narrow blocks of width h = H / N as long as what
stands between its two layers acts on each hidden unit alone. So a *module* is nothing but h hidden
units: the slices of the block's tensors that belong to them. All tensors stay in the layout PyTorch
wants; `ModuleLayer.packed` is a view of them with the module axis in front, ``[N, h, ...]``.

The paper starts its "shrunk" modules from scratch; cut this way, they start from the trained model.
Its "residual" module (bypass) is the skip of a residual block: always there, it costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eclm_flower.errors import ModularizationError

_PER_UNIT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a family says of one block: where its hidden units are. Names are relative to the block.

    Parameters
    ----------
    units : int
        Hidden width H.
    axes : dict[str, int]
        Parameter or buffer name -> the axis along which the hidden units lie.
    mixer : str
        The submodule that mixes the hidden units back. Its input is where the gates scale them.
    channel_axis : int
        Axis of the hidden units in the mixer's input: 1 for images ``[B, H, y, x]``, -1 otherwise.
    """

    units: int
    axes: Mapping[str, int]
    mixer: str
    channel_axis: int


def split_between(block: nn.Module, *, into: Sequence[str], out_of: str) -> Split:
    """Describe the hidden units between the layers `into` (which make them) and `out_of`.

    Parameters
    ----------
    block : nn.Module
        The block that holds the named layers.
    into : sequence of str
        Names of the layers whose outputs are the hidden units: a linear or convolution first, then
        what acts on each unit alone and has tensors of its own (batch norm).
    out_of : str
        Name of the linear or convolution that reads the hidden units.
    """
    mixer = block.get_submodule(out_of)
    if not isinstance(mixer, nn.Linear | nn.Conv1d | nn.Conv2d):
        raise ModularizationError(
            f"Expected '{out_of}' to be a linear or convolution, got {type(mixer).__name__}."
        )
    units = mixer.weight.shape[1]
    for name in (*into, out_of):
        if getattr(block.get_submodule(name), "groups", 1) != 1:
            raise ModularizationError(
                f"'{name}' is a grouped convolution: it does not join all its inputs with all its "
                "outputs. Register a split whose modules are its groups."
            )
    axes: dict[str, int] = {}
    for name in into:
        layer = block.get_submodule(name)
        if not isinstance(layer, _PER_UNIT_LAYERS):
            raise ModularizationError(
                f"Expected '{name}' to act on each hidden unit alone (linear, convolution, batch "
                f"norm), got {type(layer).__name__}: hidden units it mixes can't be told apart."
            )
        for key, tensor in layer.state_dict().items():
            if tensor.ndim > 0:  # num_batches_tracked is a count of the whole layer
                if len(tensor) != units:
                    raise ModularizationError(
                        f"Expected '{name}' to have a row for each of the {units} hidden units "
                        f"that '{out_of}' reads, got {len(tensor)}."
                    )
                axes[f"{name}.{key}"] = 0
    axes[f"{out_of}.weight"] = 1
    return Split(
        units=units,
        axes=axes,
        mixer=out_of,
        channel_axis=-1 if isinstance(mixer, nn.Linear) else 1,
    )


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
    axes : dict[str, int]
        Model state key -> axis of the hidden units. These tensors are modular; all others shared.
    mixer : str
        Path of the submodule whose input the gates scale.
    channel_axis : int
        Axis of the hidden units in that input.
    """

    name: str
    modules: int
    units: int
    axes: Mapping[str, int]
    mixer: str
    channel_axis: int

    @property
    def units_per_module(self) -> int:
        """Hidden units h of one module."""
        return self.units // self.modules

    def take(self, key: str, tensor: Tensor, modules: Sequence[int]) -> Tensor:
        """Cut the chosen modules out of a whole tensor.

        Parameters
        ----------
        key : str
            State key, one of `axes`.
        tensor : Tensor
            ``[..., H, ...]`` with the hidden units along ``axes[key]``.
        modules : sequence of int
            Chosen modules, ascending.

        Returns
        -------
        Tensor
            ``[..., m * h, ...]``; a copy, through which gradients flow back to `tensor`.
        """
        units = torch.arange(self.units, device=tensor.device).view(self.modules, -1)
        return tensor.index_select(self.axes[key], units[list(modules)].flatten())

    def packed(self, key: str, tensor: Tensor) -> Tensor:
        """View a tensor that holds m modules as ``[m, h, ...]``, the module axis in front.

        It is a view: writing to it writes to `tensor`.
        """
        in_front = tensor.movedim(self.axes[key], 0)
        return in_front.view(-1, self.units_per_module, *in_front.shape[1:])

    def spread(self, gates: Tensor, ndim: int) -> Tensor:
        """Turn one gate a module, ``[B, m]``, into one a hidden unit, ready to multiply with.

        Returns
        -------
        Tensor
            ``[B, m * h, 1, 1]`` for images, ``[B, 1, ..., m * h]`` otherwise; `ndim` axes.
        """
        scale = gates.repeat_interleave(self.units_per_module, dim=1)
        ones = (1,) * (ndim - 2)
        shape = (len(scale), -1, *ones) if self.channel_axis == 1 else (len(scale), *ones, -1)
        return scale.view(shape)


def match_sizes(layer: nn.Module) -> None:
    """Make a standard layer's size attributes say what its (narrowed) tensors are."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Conv1d | nn.Conv2d):
        layer.out_channels = layer.weight.shape[0]
        layer.in_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        sized = layer.weight if layer.affine else layer.running_mean
        if sized is not None:
            layer.num_features = sized.shape[0]
