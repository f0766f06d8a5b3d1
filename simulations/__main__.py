"""``python -m simulations run``: compare strategies on a simulated fleet."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from click.core import ParameterSource
from typer import Option

from simulations.presets import known_presets, read_preset
from simulations.settings import Settings, SettingsError, engines, split_list

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
_DEFAULT = Settings()
_SUITED = "-1: what suits the data set."

# Options of more than one command.
Dataset = Annotated[
    str,
    Option(
        help="digits, hapt, cifar10, cifar100, mnist, speech, or the path of a .npz with "
        "x, y, optional device and boolean test."
    ),
]
DataDir = Annotated[str, Option(help="Folder with one folder per data set; else Hugging Face.")]
Model = Annotated[str, Option(help="auto, mlp, slim-resnet, resnet18, resnet34 or vgg16.")]
Modules = Annotated[int, Option(help="Modules a layer.")]
Devices = Annotated[int, Option(help="Devices in the fleet.")]
ClassesPerDevice = Annotated[
    int, Option(help=f"Label skew: m classes a device; 0: the data's own partition. {_SUITED}")
]
Alpha = Annotated[float, Option(help="Dirichlet division by class; 0: none.")]
FeatureShift = Annotated[
    str, Option(help="Views of the data that the cloud knows, or new ones: none, known, new.")
]
Views = Annotated[str, Option(help="Comma separated; else all that suit the data.")]
Strength = Annotated[int, Option(help="Of the views, 1 to 5.")]
Epochs = Annotated[int, Option(help=f"Offline: epochs of the whole model. {_SUITED}")]
EnhancingEpochs = Annotated[
    int, Option(help=f"Offline: epochs of sub-models as deployed. {_SUITED}")
]
Seeds = Annotated[str, Option(help="Comma separated seeds.")]
Out = Annotated[str, Option(help="Folder for the results.")]


@cli.callback()
def _callback() -> None:
    """Compare strategies on a simulated fleet of unequal devices."""


@cli.command()
def run(
    context: typer.Context,
    preset: Annotated[
        str,
        Option(
            help="Options from a file, which those given here override: "
            f"{', '.join(known_presets())}, or the path of a .toml."
        ),
    ] = "",
    dataset: Dataset = _DEFAULT.dataset,
    data_dir: DataDir = _DEFAULT.data_dir,
    model: Model = _DEFAULT.model,
    modules: Modules = _DEFAULT.modules,
    strategies: Annotated[
        str, Option(help="Comma separated, or all; see docs/rivals.md.")
    ] = "eclm,fedavg",
    variant: Annotated[str, Option(help="full, no-cloud or no-local-training.")] = _DEFAULT.variant,
    fleet: Annotated[
        str, Option(help="phones, boards, mixed, or uniform:SHARE for equal budgets.")
    ] = _DEFAULT.fleet,
    devices: Devices = _DEFAULT.devices,
    per_round: Annotated[int, Option(help="Devices that train in a round.")] = _DEFAULT.per_round,
    availability: Annotated[
        float, Option(help="Share of the time a device can be reached.")
    ] = _DEFAULT.availability,
    dropout: Annotated[
        float, Option(help="Probability that a device asked never answers.")
    ] = _DEFAULT.dropout,
    steps: Annotated[int, Option(help="Adaptation steps.")] = _DEFAULT.steps,
    shift: Annotated[
        float, Option(help="Share of a device's data that a shift replaces.")
    ] = _DEFAULT.shift,
    shift_every: Annotated[int, Option(help="Steps between shifts.")] = _DEFAULT.shift_every,
    rounds: Annotated[int, Option(help="Rounds in each step.")] = _DEFAULT.rounds,
    local_epochs: Annotated[
        int, Option(help="Epochs on a device, in a round and in local adaptation.")
    ] = _DEFAULT.local_epochs,
    learning_rate: Annotated[float, Option(help=f"Learning rate on devices. {_SUITED}")] = -1,
    batch_size: Annotated[int, Option(help="Batch size on devices.")] = _DEFAULT.batch_size,
    classes_per_device: ClassesPerDevice = -1,
    alpha: Alpha = _DEFAULT.alpha,
    feature_shift: FeatureShift = _DEFAULT.feature_shift,
    views: Views = "",
    strength: Strength = _DEFAULT.strength,
    epochs: Epochs = -1,
    enhancing_epochs: EnhancingEpochs = -1,
    module_cache: Annotated[
        bool, Option(help="Devices keep modules, and are sent only what is new to them.")
    ] = _DEFAULT.module_cache,
    evaluate_every: Annotated[
        int, Option(help="Rounds between evaluations of all devices.")
    ] = _DEFAULT.evaluate_every,
    evaluated: Annotated[
        int, Option(help="Devices to evaluate, a seeded sample; 0: all.")
    ] = _DEFAULT.evaluated,
    compute: Annotated[str, Option(help="Where models compute: cpu or cuda.")] = _DEFAULT.compute,
    seeds: Seeds = "0",
    engine: Annotated[str, Option(help="ray or in-process.")] = "ray",
    out: Out = _DEFAULT.out,
    resume: Annotated[
        bool, Option("--resume", help="Do what an interrupted run in --out left undone.")
    ] = False,
    verbose: Annotated[bool, Option(help="Show Flower's log.")] = False,
) -> None:
    """Run strategies on a simulated fleet; leaves results.csv, summary.json and a picture."""
    options = {name: value for name, value in locals().items() if name != "context"}
    if preset := options.pop("preset"):
        for name, value in read_preset(preset).items():
            if context.get_parameter_source(name) == ParameterSource.DEFAULT:
                options[name] = value
    verbose, engine = options.pop("verbose"), options.pop("engine")
    if engine not in engines():
        raise SettingsError(f"Expected --engine from {', '.join(engines())}, got '{engine}'.")
    settings = Settings.suited(**options)
    from simulations.engine import run as run_on  # late: bad options are refused in no time

    try:
        run_on(settings, engine, verbose=verbose)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command with --resume goes on from here.")


@cli.command()
def ceiling(
    dataset: Dataset = _DEFAULT.dataset,
    data_dir: DataDir = _DEFAULT.data_dir,
    model: Model = _DEFAULT.model,
    modules: Modules = _DEFAULT.modules,
    devices: Devices = _DEFAULT.devices,
    classes_per_device: ClassesPerDevice = -1,
    alpha: Alpha = _DEFAULT.alpha,
    feature_shift: FeatureShift = _DEFAULT.feature_shift,
    views: Views = "",
    strength: Strength = _DEFAULT.strength,
    epochs: Epochs = -1,
    enhancing_epochs: EnhancingEpochs = -1,
    budgets: Annotated[
        str, Option(help="Comma separated shares of the modules that devices hold.")
    ] = "0.25,0.125",
    most_devices: Annotated[
        int, Option(min=1, help="Devices of different sub-tasks to look at, for each seed.")
    ] = 8,
    seeds: Seeds = "0",
    out: Out = "runs/ceiling",
) -> None:
    """Tell how much specialising can gain on some data, before any device trains."""
    options = dict(locals())
    shares, most_devices = _shares(options.pop("budgets")), options.pop("most_devices")
    settings = Settings.suited(**options, per_round=1)  # the devices train in no round
    from rich.console import Console

    from simulations.ceiling import run_ceiling

    run_ceiling(settings, shares, most_devices=most_devices, console=Console())


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in split_list(text))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise SettingsError(f"Expected --budgets as shares in (0, 1], like 0.25, got '{text}'.")
    return shares


def main() -> None:
    """Run the command line; what the user can mend is one sentence, without a traceback."""
    try:
        cli()
    except Exception as error:
        from eclm_flower.errors import EclmError
        from simulations.datasets import DataError

        if not isinstance(error, SettingsError | DataError | EclmError):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
