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

from eclm_flower.adaptation.profile import Importance
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
    LETTERS,
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
from eclm_flower.modular.selector import top_k_gates
from eclm_flower.modular.split import columns_of, layer_by_key, to_columns


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
        The body, as views of `arrays`: not to be written to. Tensors in `columns_of` are in memory
        so, or their modules would be slow to read one by one.
    module_versions : dict[str, np.ndarray]
        Layer name -> int64 ``[N]``, the round that last changed each module; 0: none so far.
    sent_as : torch.dtype, optional
        What sub-models are rounded to for devices: float16 or bfloat16; None: not at all.
    """

    model: ModularModel
    arrays: ArrayRecord
    state: dict[str, Tensor]
    module_versions: dict[str, np.ndarray]
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
        state = _opened(model.body.state_dict(), arrays, BODY)
        return cls(
            model=model,
            arrays=arrays,
            state=_ordered(state, model),
            module_versions={
                layer.name: np.full(layer.modules, version) for layer in model.layers.values()
            },
        )

    @cached_property
    def selector(self) -> dict[str, Tensor]:
        """The selector's tensors, as views of `arrays`."""
        return _opened(self.model.selector.state_dict(), self.arrays, SELECTOR)

    @cached_property
    def deltas(self) -> DeltaModules | None:
        """The delta modules, with tensors of their own; None if there are none."""
        if self.model.deltas is None:
            return None
        deltas = copy.deepcopy(self.model.deltas)
        deltas.load_state_dict(_opened(deltas.state_dict(), self.arrays, DELTAS_STATE))
        return deltas.requires_grad_(False)

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
    def everyones_importance(self) -> Importance | None:
        """What any device would tell if the selector's gates are alike for every input, else None.

        They are in a nested order of modules, and in a selector that nobody trained.
        """
        if self.selector["heads.weight"].any():
            return None
        sizes = self.model.selector.sizes
        logits = torch.split(self.selector["heads.bias"], list(sizes.values()))
        return {
            name: top_k_gates(of_layer[None])[0].double().numpy()
            for name, of_layer in zip(sizes, logits, strict=True)
        }

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
        """How each tensor of the body travels, by a letter; see `PARTS`."""
        shared, of_modules = LETTERS[SHARED_PART], LETTERS[MODULES_PART]
        parts = set(self._parts[SHARED_PART])
        return "".join(
            shared if key in parts else of_modules[key in self._columns]
            for key in forms(self.state)
        )

    @cached_property
    def _columns(self) -> frozenset[str]:
        """Keys of the tensors in columns."""
        return columns_of(self.model.layers.values())

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
        layer_of = layer_by_key(self.model.layers.values())
        modules = {
            key: layer_of[key].take(key, self.state[key], numbers)
            for key in self._parts[MODULES_PART]
            if (numbers := send[layer_of[key].name])
        }
        shared = self._shared_arrays if send[SHARED] else {}
        travels = flattened(MODULES_PART, modules, self.sent_as, columns=self._columns)
        return _record({**shared, **travels}), config

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
        versions = {name: numbers.copy() for name, numbers in self.module_versions.items()}
        for layer, modules in self._changed(merged).items():
            versions[layer][modules] = server_round
        arrays, state = dict(self.arrays), dict(self.state)
        for key, old in self.state.items():
            new = merged.pop(key)
            if new is not old:
                array = to_array(to_columns(new) if key in self._columns else new)
                arrays[f"{BODY}{key}"] = array
                state[key] = read_array(key, array, shape=old.shape, dtype=old.dtype)
            del new
        for key, tensor in (deltas or {}).items():
            arrays[f"{DELTAS_STATE}{key}"] = to_array(tensor)
        return replace(
            self,
            arrays=_record(arrays),
            state=state,
            module_versions=versions,
        )

    def _changed(self, merged: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Say which modules of each layer have other values now."""
        changed = {}
        for layer in self.model.layers.values():
            pairs = [
                (layer.packed(key, self.state[key]), layer.packed(key, merged[key]))
                for key in layer.axes
                if merged[key] is not self.state[key]
            ]
            changed[layer.name] = [
                module
                for module in range(layer.modules)
                if any(not old[module].equal(new[module]) for old, new in pairs)
            ]
        return changed

    def modules_changed_in(self, server_round: int) -> int:
        """Count the modules that were last changed in a round; 0: in none so far."""
        return sum(int((last == server_round).sum()) for last in self.module_versions.values())


def _ordered(state: Mapping[str, Tensor], model: ModularModel) -> dict[str, Tensor]:
    """Put the tensors of modules that lie along a later axis in columns."""
    columns = columns_of(model.layers.values())
    return {key: to_columns(tensor) if key in columns else tensor for key, tensor in state.items()}


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
