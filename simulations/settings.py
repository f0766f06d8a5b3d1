"""What one experiment is: every option of ``python -m simulations run``, in one frozen record.

The same record travels to the devices as JSON inside Flower's config records, so a device behaves
alike on every engine and needs no configuration of its own.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from simulations.fleet import uniform_share

Engine = Literal["ray", "in-process"]
Compute = Literal["cpu", "cuda"]
Variant = Literal["full", "no-cloud", "no-local-training"]
FeatureShiftKind = Literal["none", "known", "new"]
JudgedOn = Literal["test", "validation"]
DATASETS = ("digits", "hapt", "cifar10", "cifar100", "mnist", "speech")

SUITED_OPTIONS = ("learning_rate", "classes_per_device", "epochs", "enhancing_epochs")
_LISTS = ("strategies", "views")
_SMALL = {"epochs": 60, "enhancing_epochs": 60}  # few samples: more epochs for the same steps
_SUITED: dict[str, dict[str, Any]] = {
    "digits": _SMALL,
    "hapt": {"epochs": 30, "enhancing_epochs": 30, "classes_per_device": 0, "learning_rate": 0.005},
    "speech": _SMALL,
    ".npz": {"epochs": 30, "enhancing_epochs": 30, "classes_per_device": 0},
}
_CHOICES = {
    "variant": Variant,
    "feature_shift": FeatureShiftKind,
    "judged_on": JudgedOn,
    "compute": Compute,
}
_LEAST = {
    "classes_per_device": 0,
    "resolution": 0,
    "rounds": 0,
    "epochs": 0,
    "enhancing_epochs": 0,
    "evaluated": 0,
}
_KINDS = {  # of a default -> what to write there
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
}
_CLOUD_ONLY = (
    "strategies",
    "rates",
    "seeds",
    "out",
    "offline_dir",
    "resume",
    "availability",
    "dropout",
    "delta_share",
    "distillation",
    "evaluated",
)


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
    resolution : int (default: 0)
        Pixels of an image's longer side, if it is to be shrunk; 0: as it is. Half of it makes a
        convolutional model eight times faster here.
    model : str (default: "auto")
        A name in `simulations.models`; "auto" takes the one that suits the data.
    modules : int (default: 16)
        Modules a layer (paper: 16).
    strategies : tuple[str, ...] (default: ("eclm", "fedavg"))
        Names in `strategies`.
    variant : {"full", "no-cloud", "no-local-training"}
        The paper's two variants of every method: devices that never come back to the cloud, or
        that only fetch models and train none.
    fleet : str (default: "phones")
        See `simulations.fleet`.
    devices : int (default: 20)
    per_round : int (default: 5)
        Devices that are asked to train in a round.
    availability, dropout : float (defaults: 1, 0)
        Share of the time a device can be reached; probability that it never answers.
    steps : int (default: 1)
        Adaptation steps, of `rounds` rounds each (paper: 100 for its longest runs).
    shift : float (default: 0.5)
        Share of a device's data that is replaced when data shifts (paper: 0.5).
    shift_every : int (default: 1)
        Steps from one shift of the data to the next.
    rounds : int (default: 10)
        Rounds in each step.
    local_epochs : int (default: 3)
        Epochs of a device's training, in a round and in its local adaptation (paper: 3).
    learning_rate : float (default: 0.002)
        Of devices: SGD, momentum 0.9. Paper: 0.001.
    rates : tuple[tuple[str, float], ...] (default: ())
        (strategy, learning rate) of strategies with another than `learning_rate`. As an option:
        the path of a ``.toml`` with lines like ``eclm = 0.002``.
    batch_size : int (default: 16)
        Of devices (paper: 16).
    classes_per_device : int (default: 2)
        Label skew: m classes a device. 0: see `alpha`.
    alpha : float (default: 0)
        Of a Dirichlet division by class. 0, and no m: the data's natural partition, or an even one.
    feature_shift : {"none", "known", "new"}
        Devices see their data in views; the cloud knows them, or not. See
        `simulations.environment.views`.
    views : tuple[str, ...] (default: ())
        Of a feature shift, "a+b": one after another; empty: all that suit the data.
    strength : int (default: 3)
        Of the views, 1 to 5.
    judged_on : {"test", "validation"}
        What devices and the whole cloud model are tested on: test data, or training data that is
        kept back from all training, for choices that may not look at test data. See
        `simulations.environment.kept_back`.
    masked_loss : bool (default: False)
        Devices train with cross-entropy over the classes they have.
    class_prior : bool (default: False)
        Devices of every method use and train their models with a class prior, as ECLM's do under
        label skew; see `eclm_flower.class_prior`.
    guard : bool (default: False)
        A device keeps the model it was sent where local adaptation doesn't help on samples held
        back from it.
    epochs, enhancing_epochs : int (defaults: 14, 9)
        Of the offline stage; see `eclm_flower.PrototypingConfig`.
    delta_share : float (default: 0.33)
        Of `enhancing_epochs`, for ECLM's delta modules; likewise.
    distillation : float (default: 0)
        Weight of the whole model's soft labels while the cloud trains sub-models, of all methods.
    module_cache : bool (default: False)
        Devices keep the modules they got, and are sent only what is new to them.
    evaluate_every : int (default: 1)
        Rounds between evaluations of all devices; the beginning and the end of a step are always
        evaluated.
    evaluated : int (default: 0)
        Devices that are evaluated, the same ones at every evaluation and for every method; 0: all.
    compute : {"cpu", "cuda"}
        Where models compute; see `simulations.compute`.
    seeds : tuple[int, ...] (default: (0,))
    out : str (default: "runs/latest")
        Folder for the results.
    offline_dir : str (default: "")
        Folder of prepared cloud models that several runs share; empty: one in `out`.
    resume : bool (default: False)
        Keep what an interrupted run of the same settings left there, and do the rest.
    """

    dataset: str = "digits"
    data_dir: str = ""
    resolution: int = 0
    model: str = "auto"
    modules: int = 16
    strategies: tuple[str, ...] = ("eclm", "fedavg")
    variant: Variant = "full"
    fleet: str = "phones"
    devices: int = 20
    per_round: int = 5
    availability: float = 1.0
    dropout: float = 0.0
    steps: int = 1
    shift: float = 0.5
    shift_every: int = 1
    rounds: int = 10
    local_epochs: int = 3
    learning_rate: float = 0.002
    rates: tuple[tuple[str, float], ...] = ()
    batch_size: int = 16
    classes_per_device: int = 2
    alpha: float = 0.0
    feature_shift: FeatureShiftKind = "none"
    views: tuple[str, ...] = ()
    strength: int = 3
    judged_on: JudgedOn = "test"
    masked_loss: bool = False
    class_prior: bool = False
    guard: bool = False
    epochs: int = 14
    enhancing_epochs: int = 9
    delta_share: float = 0.33
    distillation: float = 0.0
    module_cache: bool = False
    evaluate_every: int = 1
    evaluated: int = 0
    compute: Compute = "cpu"
    seeds: tuple[int, ...] = (0,)
    out: str = "runs/latest"
    offline_dir: str = ""
    resume: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            fine = isinstance(value, int | float if kind is float else kind)
            fine = fine and isinstance(value, bool) == (kind is bool)  # which Python calls an int
            _expect(fine, f"{option(field.name)} as {_KINDS[kind]}", repr(value))
            if kind is int:
                least = _LEAST.get(field.name, 1)
                _expect(value >= least, f"{option(field.name)} of at least {least}", value)
        _expect(
            self.dataset in DATASETS or self.dataset.endswith(".npz"),
            f"a data set from {', '.join(DATASETS)}, or the path of a .npz",
            f"'{self.dataset}'",
        )
        _expect(
            self.per_round <= self.devices,
            f"--per-round of at most the {self.devices} devices",
            self.per_round,
        )
        _expect(
            self.evaluated <= self.devices,
            f"--evaluated of at most the {self.devices} devices",
            self.evaluated,
        )
        _expect(0 < self.learning_rate < 10, "--learning-rate > 0", self.learning_rate)
        for strategy, rate in self.rates:
            _expect(0 < rate < 10, f"--rates > 0, below 10, for {strategy}", rate)
        for name in ("strategies", "seeds"):
            values = getattr(self, name)
            fine = len(set(values)) == len(values) > 0
            _expect(fine, f"--{name} as a list without repetitions", f"'{_joined(values)}'")
        _expect(min(self.seeds) >= 0, "seeds of at least 0", min(self.seeds))
        try:
            uniform_share(self.fleet)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        self._check_environment()

    def _check_environment(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            _expect(
                value in get_args(known),
                f"{option(name)} from {', '.join(get_args(known))}",
                f"'{value}'",
            )
        _expect(0 < self.availability <= 1, "--availability above 0, at most 1", self.availability)
        _expect(0 <= self.dropout < 1, "--dropout from 0 to below 1", self.dropout)
        _expect(0 <= self.shift <= 1, "--shift from 0 to 1", self.shift)
        for name in ("delta_share", "distillation"):
            value = getattr(self, name)
            _expect(0 <= value <= 1, f"{option(name)} from 0 to 1", value)
        _expect(0 <= self.alpha < float("inf"), "--alpha of at least 0", self.alpha)
        _expect(
            not (self.alpha and self.classes_per_device),
            "--alpha or --classes-per-device, which are two ways to divide the data",
            "both",
        )
        _expect(1 <= self.strength <= 5, "--strength of 1 to 5", self.strength)
        _expect(
            not self.views or self.feature_shift != "none",
            "--feature-shift known or new with --views",
            "neither",
        )

    def for_devices(self) -> Self:
        """Return the settings without what concerns the cloud alone: fewer bytes, equal bytes."""
        return replace(self, **{name: getattr(type(self), name) for name in _CLOUD_ONLY})

    def with_rate_of(self, strategy: str) -> Self:
        """Return the settings of one strategy: with its own learning rate, if it has one."""
        rate = dict(self.rates).get(strategy, self.learning_rate)
        return replace(self, learning_rate=rate, rates=())

    def to_json(self) -> str:
        """Write what differs from the defaults as JSON."""
        return json.dumps({k: v for k, v in asdict(self).items() if v != getattr(type(self), k)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**{name: _frozen(value) for name, value in json.loads(text).items()})

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

        So do learning rate, classes per device and the two numbers of epochs when they are -1. With
        `alpha` or a feature shift, classes per device are 0 if left out.

        Lists may be comma separated text, and paths become absolute, so that devices, which may
        run elsewhere, find them.
        """
        given: dict[str, Any] = {
            name: value
            for name, value in values.items()
            if not (name in SUITED_OPTIONS and value == -1)
        }
        dataset = str(given.get("dataset", cls.dataset))
        suited = _SUITED.get(".npz" if dataset.endswith(".npz") else dataset, {})
        if given.get("alpha") or given.get("feature_shift", "none") != "none":
            suited = {**suited, "classes_per_device": 0}
        given = {**suited, **given}
        for name in _LISTS:
            if isinstance(value := given.get(name), str):
                given[name] = split_list(value)
        if isinstance(seeds := given.get("seeds"), str | int):
            given["seeds"] = split_seeds(str(seeds))
        if isinstance(rates := given.get("rates"), str):
            given["rates"] = read_rates(Path(rates)) if rates else ()
        for name in ("data_dir", "out", "offline_dir", "dataset"):
            path = str(given.get(name, ""))
            if path and (name != "dataset" or path.endswith(".npz")):
                given[name] = str(Path(path).expanduser().absolute())
        return cls(**given)

    @property
    def out_dir(self) -> Path:
        """The folder for the results."""
        return Path(self.out)

    @property
    def offline_folder(self) -> Path:
        """The folder of prepared cloud models."""
        return Path(self.offline_dir) if self.offline_dir else self.out_dir / "offline"

    def phase(self, step: int) -> int:
        """Return how often data has shifted at a step."""
        return step // self.shift_every


def read_rates(path: Path) -> tuple[tuple[str, float], ...]:
    """Read learning rates, strategy by strategy, from a ``.toml``.

    Raises
    ------
    SettingsError
        There is no such file, or something in it is no rate.
    """
    try:
        rates = tomllib.loads(path.expanduser().read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"Can't read --rates {path}: {error}; expected lines like eclm = 0.002."
        ) from error
    for strategy, rate in rates.items():
        fine = isinstance(rate, int | float) and not isinstance(rate, bool)
        _expect(fine, f"a learning rate for {strategy} in {path}", repr(rate))
    return tuple(sorted((strategy, float(rate)) for strategy, rate in rates.items()))


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


def option(name: str) -> str:
    """Write a field's name as an option."""
    return f"--{name.replace('_', '-')}"


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _joined(values: tuple[Any, ...]) -> str:
    return ",".join(str(value) for value in values)


def _expect(fine: bool, expected: str, got: object) -> None:
    if not fine:
        raise SettingsError(f"Expected {expected}, got {got}.")
