"""``python -m simulations run``: compare strategies on a simulated fleet."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from simulations.presets import known_presets
from simulations.run_options import with_options_of, with_preset
from simulations.settings import Settings, SettingsError, split_list
from simulations.trials import SEEDS as TUNING_SEEDS
from simulations.trials import TRIALS, split_trials

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
Resolution = Annotated[
    int, Option(help="Shrink images to so many pixels a side; 0: as they are. Half is 8x faster.")
]
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
Views = Annotated[
    str, Option(help="Comma separated, a+b: one after another; else all that suit the data.")
]
Strength = Annotated[int, Option(help="Of the views, 1 to 5.")]
Epochs = Annotated[int, Option(help=f"Offline: epochs of the whole model. {_SUITED}")]
EnhancingEpochs = Annotated[
    int, Option(help=f"Offline: epochs of sub-models as deployed. {_SUITED}")
]
Seeds = Annotated[str, Option(help="Comma separated seeds.")]
Out = Annotated[str, Option(help="Folder for the results.")]
OfflineDir = Annotated[
    str, Option(help="Folder of prepared cloud models that runs share; else one in --out.")
]


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
    resolution: Resolution = _DEFAULT.resolution,
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
    rates: Annotated[
        str, Option(help="A .toml of learning rates, strategy by strategy; see tune.")
    ] = "",
    batch_size: Annotated[int, Option(help="Batch size on devices.")] = _DEFAULT.batch_size,
    classes_per_device: ClassesPerDevice = -1,
    alpha: Alpha = _DEFAULT.alpha,
    feature_shift: FeatureShift = _DEFAULT.feature_shift,
    views: Views = "",
    strength: Strength = _DEFAULT.strength,
    judged_on: Annotated[
        str, Option(help="test, or validation: training data that is kept back for choices.")
    ] = _DEFAULT.judged_on,
    masked_loss: Annotated[
        bool, Option("--masked-loss", help="Devices train among their own classes only.")
    ] = _DEFAULT.masked_loss,
    class_prior: Annotated[
        bool, Option("--class-prior", help="All methods' devices know their classes, as ECLM's do.")
    ] = _DEFAULT.class_prior,
    guard: Annotated[
        bool, Option("--guard", help="Devices undo a local adaptation that doesn't help.")
    ] = _DEFAULT.guard,
    epochs: Epochs = -1,
    enhancing_epochs: EnhancingEpochs = -1,
    delta_share: Annotated[
        float, Option(help="Of those epochs, for ECLM's delta modules; 0: it has none.")
    ] = _DEFAULT.delta_share,
    distillation: Annotated[
        float, Option(help="Weight of the whole model's soft labels for sub-models in the cloud.")
    ] = _DEFAULT.distillation,
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
    offline_dir: OfflineDir = "",
    resume: Annotated[
        bool, Option("--resume", help="Do what an interrupted run in --out left undone.")
    ] = False,
    verbose: Annotated[bool, Option(help="Show Flower's log.")] = False,
) -> None:
    """Run strategies on a simulated fleet; leaves results.csv, summary.json and a picture."""
    options = {name: value for name, value in locals().items() if name != "context"}
    options = with_preset(context, options)
    verbose, engine = options.pop("verbose"), options.pop("engine")
    settings = Settings.suited(**options)
    from simulations.engine import run as run_on  # late: bad options are refused in no time

    try:
        run_on(settings, engine, verbose=verbose)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command with --resume goes on from here.")


@cli.command()
@with_options_of(run, but=("learning_rate", "rates", "judged_on", "seeds", "engine", "resume"))
def tune(
    context: typer.Context,
    trials: Annotated[
        str, Option(help="Comma separated learning rates, the same for every strategy.")
    ] = ",".join(f"{rate:g}" for rate in TRIALS),
    tuning_seeds: Annotated[
        str, Option(help="Comma separated seeds of the trials: none that is reported.")
    ] = TUNING_SEEDS,
    write: Annotated[
        str, Option(help="The .toml for --rates, beside which the trials go; else in --out.")
    ] = "",
    out: Out = "runs/tuning",
    **options: Any,
) -> None:
    """Choose a learning rate for every strategy of a run, on validation data."""
    rates = split_trials(trials)
    not_of_a_preset = ("learning_rate", "rates", "judged_on", "seeds", "engine")
    options = with_preset(context, options, but=not_of_a_preset)
    verbose = options.pop("verbose")
    settings = Settings.suited(**options, out=out, seeds=tuning_seeds)
    from rich.console import Console

    from simulations.tuning import tune as tune_rates

    try:
        tune_rates(
            settings,
            rates,
            Path(write) if write else settings.out_dir / "rates.toml",
            command=f"python -m simulations {shlex.join(sys.argv[1:])}",
            console=Console(),
            verbose=verbose,
        )
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")


@cli.command()
def table(
    name: Annotated[
        str,
        Argument(help="A file in simulations/tables without its .toml, or the path of a .toml."),
    ],
    data_dir: DataDir = "",
    jobs: Annotated[int, Option(min=1, help="Rows and seeds at a time, each on one core.")] = 1,
    runs: Annotated[
        str, Option(help="Folder of the runs and prepared cloud models.")
    ] = "runs/tables",
    tune: Annotated[
        bool, Option("--tune", help="Only choose the learning rates that the table needs.")
    ] = False,
    report: Annotated[
        bool, Option("--report", help="Only report what is there, from committed rows alone.")
    ] = False,
    redo: Annotated[
        str, Option(help="Comma separated strategies that are run, or tuned, anew.")
    ] = "",
    only: Annotated[str, Option(help="Comma separated rows to run, or tune; else all.")] = "",
    compute: Annotated[str, Option(help="Where models compute: cpu or cuda.")] = "cpu",
    page: Annotated[
        str, Option(help="A page whose part for this table is brought up to date.")
    ] = "",
) -> None:
    """Run what is missing of a table of evidence, and print it; see docs/evidence.md."""
    from simulations.tables.command import run_table

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
    try:
        run_table(
            name,
            data_dir=data_dir,
            jobs=jobs,
            runs=Path(runs).absolute(),
            tune=tune,
            report=report,
            redo=redo,
            page=page,
            only=only,
            compute=compute,
        )
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")


@cli.command()
def ceiling(
    dataset: Dataset = _DEFAULT.dataset,
    data_dir: DataDir = _DEFAULT.data_dir,
    resolution: Resolution = _DEFAULT.resolution,
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
