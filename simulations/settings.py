"""What one experiment is: every option of ``python -m simulations run``, in one frozen record.

The same record travels to the devices as JSON inside Flower's config records, so a device behaves
alike on every engine and needs no configuration of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

Engine = Literal["ray", "in-process"]
DATASETS = ("digits", "hapt", "cifar10", "cifar100", "mnist", "speech")

_SUITED_OPTIONS = ("learning_rate", "classes_per_device", "epochs", "enhancing_epochs")
_SMALL = {"epochs": 60, "enhancing_epochs": 60}  # few samples: more epochs for the same steps
_SUITED: dict[str, dict[str, Any]] = {
    "digits": _SMALL,
    "hapt": {"epochs": 30, "enhancing_epochs": 30, "classes_per_device": 0, "learning_rate": 0.005},
    "speech": _SMALL,
    ".npz": {"epochs": 30, "enhancing_epochs": 30, "classes_per_device": 0},
}


class SettingsError(ValueError):
    """An option of the experiment makes no sense; the message says which, and what would."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One experiment.

    Attributes
    ----------
    dataset : str (default: "digits")
        A name in `DATASETS`, or the path of a ``.npz``.
    data_dir : str (default: "")
        Folder with one folder per data set; empty: embedded, or from Hugging Face.
    model : str (default: "auto")
        A name in `simulations.models`; "auto" takes the one that suits the data.
    modules : int (default: 16)
        Modules a layer (paper: 16).
    strategies : tuple[str, ...] (default: ("eclm", "fedavg"))
        Names in `strategies`.
    devices : int (default: 20)
    per_round : int (default: 5)
        Devices that train in a round.
    rounds : int (default: 10)
    local_epochs : int (default: 3)
        Epochs of a device's training, in a round and in its local adaptation (paper: 3).
    learning_rate : float (default: 0.002)
        Of devices: SGD, momentum 0.9. Paper: 0.001.
    batch_size : int (default: 16)
        Of devices (paper: 16).
    classes_per_device : int (default: 2)
        Label skew: m classes a device. 0: the data's natural partition, or an even one.
    epochs, enhancing_epochs : int (defaults: 14, 9)
        Of the offline stage; see `eclm_flower.PrototypingConfig`.
    evaluate_every : int (default: 1)
        Rounds between evaluations of all devices; round 0 and the last are always evaluated.
    seeds : tuple[int, ...] (default: (0,))
    out : str (default: "runs/latest")
        Folder for the results.
    """

    dataset: str = "digits"
    data_dir: str = ""
    model: str = "auto"
    modules: int = 16
    strategies: tuple[str, ...] = ("eclm", "fedavg")
    devices: int = 20
    per_round: int = 5
    rounds: int = 10
    local_epochs: int = 3
    learning_rate: float = 0.002
    batch_size: int = 16
    classes_per_device: int = 2
    epochs: int = 14
    enhancing_epochs: int = 9
    evaluate_every: int = 1
    seeds: tuple[int, ...] = (0,)
    out: str = "runs/latest"

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS and not self.dataset.endswith(".npz"):
            raise SettingsError(
                f"Expected a data set from {', '.join(DATASETS)}, or the path of a .npz, got "
                f"'{self.dataset}'."
            )
        least = {"classes_per_device": 0, "rounds": 0, "epochs": 0, "enhancing_epochs": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < least.get(field.name, 1):
                raise SettingsError(
                    f"Expected {_option(field.name)} of at least {least.get(field.name, 1)}, "
                    f"got {value}."
                )
        if self.per_round > self.devices:
            raise SettingsError(
                f"Expected --per-round of at most the {self.devices} devices, got {self.per_round}."
            )
        if not 0 < self.learning_rate < 10:
            raise SettingsError(f"Expected --learning-rate > 0, got {self.learning_rate}.")
        for name in ("strategies", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise SettingsError(
                    f"Expected --{name} as a list without repetitions, got '{_joined(values)}'."
                )
        if min(self.seeds) < 0:
            raise SettingsError(f"Expected seeds of at least 0, got {min(self.seeds)}.")

    def for_devices(self) -> Self:
        """Return the settings without what concerns the cloud alone: fewer bytes, equal bytes."""
        cloud = ("strategies", "seeds", "out")
        return replace(self, **{name: getattr(type(self), name) for name in cloud})

    def to_json(self) -> str:
        """Write the settings as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in json.loads(text).items()
        }
        return cls(**values)

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Self:
        """Read the settings from Flower's run config (``flwr run . -c "rounds=5"``).

        Keys are written with dashes; lists are comma separated.
        """
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in run_config.items():
            name = key.replace("-", "_")
            if name not in known:
                raise SettingsError(f"Unknown key '{key}' in the run config.")
            values[name] = value
        return cls.suited(**values)

    @classmethod
    def suited(cls, **values: Any) -> Self:
        """Build settings from options; those left out become what suits the data set.

        So do learning rate, classes per device and the two numbers of epochs when they are -1.

        Lists may be comma separated text, and paths become absolute, so that devices, which may
        run elsewhere, find them.
        """
        given: dict[str, Any] = {
            name: value
            for name, value in values.items()
            if not (name in _SUITED_OPTIONS and value == -1)
        }
        dataset = str(given.get("dataset", cls.dataset))
        suited = _SUITED.get(".npz" if dataset.endswith(".npz") else dataset, {})
        given = {**suited, **given}
        if isinstance(strategies := given.get("strategies"), str):
            given["strategies"] = split_list(strategies)
        if isinstance(seeds := given.get("seeds"), str | int):
            given["seeds"] = split_seeds(str(seeds))
        for name in ("data_dir", "out", "dataset"):
            path = str(given.get(name, ""))
            if path and (name != "dataset" or path.endswith(".npz")):
                given[name] = str(Path(path).expanduser().absolute())
        return cls(**given)

    @property
    def out_dir(self) -> Path:
        """The folder for the results."""
        return Path(self.out)


def split_list(text: str) -> tuple[str, ...]:
    """Split a comma separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def split_seeds(text: str) -> tuple[int, ...]:
    """Split a comma separated list of seeds."""
    try:
        return tuple(int(part) for part in split_list(text))
    except ValueError:
        raise SettingsError(f"Expected --seeds as numbers, like 0,1,2, got '{text}'.") from None


def engines() -> tuple[str, ...]:
    """Names of the engines."""
    return get_args(Engine)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _joined(values: tuple[Any, ...]) -> str:
    return ",".join(str(value) for value in values)
