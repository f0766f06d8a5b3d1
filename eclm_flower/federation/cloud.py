"""The cloud model between two rounds: what is sent of it, and when each part last changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from eclm_flower.errors import ReplyError, RequestError
from eclm_flower.federation.cache import Digests, digests_of, lacking, shared_piece
from eclm_flower.federation.decoding import read_array
from eclm_flower.federation.messages import (
    BODY,
    DELTAS_STATE,
    DOWNLOAD,
    PARTS,
    SELECTOR,
    SHARED,
    selection_to_config,
    to_array,
)
from eclm_flower.federation.wire import (
    MODULES_PART,
    SELECTOR_PART,
    SHARED_PART,
    by_part,
    flattened,
    forms,
    rounded,
)
from eclm_flower.modular.deltas import DeltaModules
from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.selection import Selection, whole


@dataclass(frozen=True, kw_only=True)
class CloudModel:
    """The cloud model as it is in one round.

    Attributes
    ----------
    model : ModularModel
        Its structure; the weights in it are not used.
    arrays : ArrayRecord
        Body, selector and delta modules, as `ModularModel.state_dict` keys them.
    state : dict[str, Tensor]
        The body, as views of `arrays`: not to be written to.
    module_versions : dict[str, np.ndarray]
        Layer name -> int64 ``[N]``, the round that last changed each module; 0: none so far.
    shared_version : int
        The round that last changed the shared part.
    sent_as : torch.dtype, optional
        What sub-models are rounded to for devices: float16 or bfloat16; None: not at all.
    """

    model: ModularModel
    arrays: ArrayRecord
    state: dict[str, Tensor]
    module_versions: dict[str, np.ndarray]
    shared_version: int
    sent_as: torch.dtype | None = None

    @classmethod
    def opened(cls, model: ModularModel, arrays: ArrayRecord, version: int) -> CloudModel:
        """Open arrays that come from outside: every part is as new as `version`.

        Raises
        ------
        RequestError
            They aren't those of the modular model.
        """
        expected = model.state_dict()
        if arrays.keys() != expected.keys():
            raise RequestError(
                "Expected the arrays of the modular model, "
                "initial_arrays=ArrayRecord(model.state_dict()); differing keys: "
                f"{sorted(arrays.keys() ^ expected.keys())[:4]}."
            )
        return cls(
            model=model,
            arrays=arrays,
            state=_views(model, arrays),
            module_versions={
                layer.name: np.full(layer.modules, version) for layer in model.layers.values()
            },
            shared_version=version,
        )

    @cached_property
    def selector(self) -> dict[str, Tensor]:
        """The selector's tensors, as views of `arrays`."""
        return _opened(self.model.selector.state_dict(), self.arrays, SELECTOR)

    @cached_property
    def deltas(self) -> DeltaModules | None:
        """The delta modules, with tensors of their own; None if there are none, or all are zero."""
        if self.model.deltas is None:
            return None
        deltas = copy.deepcopy(self.model.deltas)
        deltas.load_state_dict(_opened(deltas.state_dict(), self.arrays, DELTAS_STATE))
        return None if deltas.empty else deltas.requires_grad_(False)

    def specialised(self, mixture: Tensor) -> CloudModel:
        """Return the cloud model as it is for devices of a mixture of sub-tasks."""
        assert self.deltas is not None
        everything = whole(self.model.layers.values())
        return replace(self, state=self.deltas.merged(self.state, everything, mixture))

    @cached_property
    def selector_arrays(self) -> ArrayRecord:
        """The selector, as a query carries it."""
        return _record(flattened(SELECTOR_PART, self.selector))

    @cached_property
    def _shared_arrays(self) -> dict[str, Array]:
        """The shared part as it travels: the same objects in every message."""
        shared = {key: self.state[key] for key in self._parts[SHARED_PART]}
        arrays = flattened(SHARED_PART, shared, self.sent_as)
        return {**arrays, **(self.selector_arrays if self.model.gating == "selector" else {})}

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Part -> keys of its tensors."""
        parts = by_part(forms(self.state), self.model.layers.values())
        return {part: list(keys) for part, keys in parts.items()}

    @cached_property
    def _letters(self) -> str:
        """Part of each tensor of the body that travels, by its first letter."""
        shared = set(self._parts[SHARED_PART])
        return "".join(
            (SHARED_PART if key in shared else MODULES_PART)[0] for key in forms(self.state)
        )

    @cached_property
    def digests(self) -> Digests:
        """Digests of all modules and of the shared part as devices get them, for their caches."""
        state = self.state
        if self.sent_as is not None:
            state = {
                key: rounded(tensor, self.sent_as) if tensor.is_floating_point() else tensor
                for key, tensor in state.items()
            }
        shared = {SHARED_PART: {key: state[key] for key in self._parts[SHARED_PART]}}
        if self.model.gating == "selector":
            shared[SELECTOR_PART] = self.selector
        return digests_of(list(self.model.layers.values()), state, shared_piece(shared))

    def pack(
        self, selection: Selection, cached: Digests | None = None
    ) -> tuple[ArrayRecord, dict[str, list[int] | str]]:
        """Pack what a device needs of a sub-model.

        Parameters
        ----------
        selection : dict[str, sequence of int]
            The sub-model's modules.
        cached : dict[str, sequence of int], optional
            What the device holds already.

        Returns
        -------
        ArrayRecord
            As `eclm_flower.federation.wire` says.
        dict[str, list of int or str]
            Config entries that say what they are.
        """
        config: dict[str, list[int] | str] = {PARTS: self._letters}
        if self.sent_as is not None:
            config[DOWNLOAD] = str(self.sent_as).removeprefix("torch.")
        config.update(selection_to_config(selection))
        send: Selection = {SHARED: (0,), **selection}
        if cached:
            send, told = lacking(selection, self.digests, cached)
            config.update(told)
        layer_of = {key: layer for layer in self.model.layers.values() for key in layer.axes}
        modules = {
            key: layer_of[key].take(key, self.state[key], numbers)
            for key in self._parts[MODULES_PART]
            if (numbers := send[layer_of[key].name])
        }
        shared = self._shared_arrays if send[SHARED] else {}
        return _record({**shared, **flattened(MODULES_PART, modules, self.sent_as)}), config

    def after(
        self,
        server_round: int,
        merged: dict[str, Tensor],
        deltas: Mapping[str, Tensor] | None = None,
    ) -> CloudModel:
        """Return the cloud model after a round, with the versions of what really changed.

        Parameters
        ----------
        server_round : int
            The round.
        merged : dict[str, Tensor]
            The body's state after the round; tensors that are the objects of `state` didn't change.
            It is emptied, so that each tensor is in memory once.
        deltas : dict[str, Tensor], optional
            State of the delta modules after the round, where it changed.
        """
        layer_of = {key: layer for layer in self.model.layers.values() for key in layer.axes}
        versions = {name: numbers.copy() for name, numbers in self.module_versions.items()}
        shared_version = self.shared_version
        arrays = dict(self.arrays)
        for key, old in self.state.items():
            new = merged.pop(key)
            if new is old:
                continue
            if layer := layer_of.get(key):
                differs = layer.packed(key, old) != layer.packed(key, new)
                versions[layer.name][differs.flatten(1).any(dim=1).numpy()] = server_round
            elif not new.equal(old):
                shared_version = server_round
            arrays[f"{BODY}{key}"] = to_array(new)
        for key, tensor in (deltas or {}).items():
            arrays[f"{DELTAS_STATE}{key}"] = to_array(tensor)
        record = _record(arrays)
        return replace(
            self,
            arrays=record,
            state=_views(self.model, record),
            module_versions=versions,
            shared_version=shared_version,
        )

    def modules_changed_in(self, server_round: int) -> int:
        """Count the modules that were last changed in a round; 0: in none so far."""
        return sum(int((last == server_round).sum()) for last in self.module_versions.values())


def _views(model: ModularModel, arrays: ArrayRecord) -> dict[str, Tensor]:
    return _opened(model.body.state_dict(), arrays, BODY)


def _opened(like: Mapping[str, Tensor], arrays: ArrayRecord, prefix: str) -> dict[str, Tensor]:
    """View arrays as tensors, in the order of `like`."""
    try:
        return {
            key: read_array(key, arrays[f"{prefix}{key}"], shape=tensor.shape, dtype=tensor.dtype)
            for key, tensor in like.items()
        }
    except ReplyError as error:
        raise RequestError(
            f"The initial arrays are not those of the modular model: {error}"
        ) from error


def _record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """Make a record that holds these very arrays: its constructor would copy them."""
    record = ArrayRecord()
    for key, array in arrays.items():
        record[key] = array
    return record
