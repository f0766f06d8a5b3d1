"""A folder of checkpoints: written whole or not at all, refused when damaged.

::

    checkpoint_dir/
      round-000011/           the one before, in case the newest is damaged
      round-000012/
        tensors.safetensors   the cloud model and what is known of devices
        state.json            everything else, and the digests of both files
      .writing-round-000013/  half written: ignored, and removed by the next start

A checkpoint is written beside the others, forced to the disk, and then renamed, which file systems
do at once. What it holds is for `run_state` to say.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common.logger import log
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from eclm_flower.errors import CheckpointError

FORMAT = 3  #: of the files; a checkpoint of another is refused
_KEPT = 2
_TENSORS, _STATE = "tensors.safetensors", "state.json"
_WRITING, _REMOVING = ".writing-", ".removing-"
_ROUND = re.compile(r"round-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes
    ----------
    server_round : int
        The last complete round.
    facts : dict
        What JSON can say.
    tensors : dict[str, np.ndarray]
        The numbers.
    """

    server_round: int
    facts: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]


class CheckpointFolder:
    """Where a run keeps its last two checkpoints.

    Parameters
    ----------
    path : path
        The folder; made when missing. One run at a time may use it.
    every : int (default: 1)
        Rounds between checkpoints.
    """

    def __init__(self, path: str | Path, *, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"Expected checkpoint_every >= 1, got {every}.")
        self.path = Path(path)
        self.every = every

    def newest(self) -> Path | None:
        """Return the newest checkpoint's folder, if there is one."""
        rounds = self._rounds()
        return rounds[-1] if rounds else None

    def _rounds(self) -> list[Path]:
        found = [entry for entry in self.path.glob("round-*") if _ROUND.fullmatch(entry.name)]
        return sorted(found, key=lambda entry: int(entry.name.removeprefix("round-")))

    def prepare(self) -> None:
        """Make the folder and remove what a killed run left half done.

        Raises
        ------
        CheckpointError
            It can't be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for entry in self.path.iterdir():
                if entry.name.startswith((_WRITING, _REMOVING)):
                    shutil.rmtree(entry)
            probe = self.path / f"{_WRITING}probe"
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise CheckpointError(
                f"Can't write checkpoints to {self.path}: {error.strerror}. Choose another "
                "checkpoint_dir."
            ) from error

    def save(self, checkpoint: Checkpoint) -> Path | None:
        """Write a checkpoint, and remove the oldest ones.

        A run outlives a full disk: then this says so in the log, and leaves what there was.

        Returns
        -------
        Path or None
            Its folder; None if it could not be written.
        """
        name = f"round-{checkpoint.server_round:06d}"
        writing, final = self.path / f"{_WRITING}{name}", self.path / name
        try:
            writing.mkdir()
            save_file(dict(checkpoint.tensors), writing / _TENSORS)
            told = {"round": checkpoint.server_round, "facts": checkpoint.facts}
            digests = {_TENSORS: _sha256_of(writing / _TENSORS), _STATE: _sha256_of_json(told)}
            state = {"format": FORMAT, "sha256": digests, **told}
            (writing / _STATE).write_text(json.dumps(state))
            for path in (writing / _TENSORS, writing / _STATE, writing):
                _force_to_disk(path)
            writing.rename(final)
            _force_to_disk(self.path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(writing, ignore_errors=True)
            log(ERROR, "The checkpoint of round %s is not written: %s", name, error)
            return None
        try:
            for old in self._rounds()[:-_KEPT]:
                removing = old.rename(self.path / f"{_REMOVING}{old.name}")
                shutil.rmtree(removing)
        except OSError as error:
            log(WARNING, "An older checkpoint can't be removed: %s", error)
        return final

    def load(self) -> Checkpoint | None:
        """Read the newest checkpoint.

        Returns
        -------
        Checkpoint or None
            None if the folder holds none.

        Raises
        ------
        CheckpointError
            It is damaged, or of another format; it is left as it is.
        """
        newest = self.newest()
        if newest is None:
            return None
        try:
            text = (newest / _STATE).read_text()
            state = json.loads(text)
            version = state["format"]
            if version != FORMAT:
                raise CheckpointError(
                    f"The checkpoint {newest} has format {version}, but this version of "
                    f"eclm-flower reads format {FORMAT}. Go on with the version that wrote it, or "
                    "choose an empty checkpoint_dir."
                )
            digests, told = state["sha256"], {key: state[key] for key in ("round", "facts")}
            # Text may differ where values do not: the last of a number's many digits.
            if json.dumps(state) != text or _sha256_of_json(told) != digests[_STATE]:
                raise ValueError(f"{_STATE} was changed")
            if _sha256_of(newest / _TENSORS) != digests[_TENSORS]:
                raise ValueError(f"{_TENSORS} is truncated or was changed")
            return Checkpoint(told["round"], told["facts"], load_file(newest / _TENSORS))
        except CheckpointError:
            raise
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            before = [path.name for path in self._rounds()[:-1]]
            remedy = f"to go on after {before[-1]}" if before else "to start anew"
            raise CheckpointError(
                f"The checkpoint {newest} is damaged ({error}). It is left as it is; move it away "
                f"{remedy}."
            ) from error


def _sha256_of_json(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _force_to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows can't, and needs not
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
