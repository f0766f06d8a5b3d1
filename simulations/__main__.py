"""``python -m simulations run``: compare strategies on a simulated fleet."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer import Option

from simulations.settings import Settings, SettingsError, engines

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
_DEFAULT = Settings()
_SUITED = "-1: what suits the data set."


@cli.callback()
def _callback() -> None:
    """Compare strategies on a simulated fleet of unequal devices."""


@cli.command()
def run(
    dataset: Annotated[
        str,
        Option(
            help="digits, hapt, cifar10, cifar100, mnist, speech, or the path of a .npz with "
            "x, y, optional device and boolean test."
        ),
    ] = _DEFAULT.dataset,
    data_dir: Annotated[
        str, Option(help="Folder with one folder per data set; else Hugging Face.")
    ] = _DEFAULT.data_dir,
    model: Annotated[
        str, Option(help="auto, mlp, slim-resnet, resnet18 or resnet34.")
    ] = _DEFAULT.model,
    modules: Annotated[int, Option(help="Modules a layer.")] = _DEFAULT.modules,
    strategies: Annotated[str, Option(help="Comma separated: eclm, fedavg.")] = "eclm,fedavg",
    devices: Annotated[int, Option(help="Devices in the fleet.")] = _DEFAULT.devices,
    per_round: Annotated[int, Option(help="Devices that train in a round.")] = _DEFAULT.per_round,
    rounds: Annotated[int, Option(help="Rounds.")] = _DEFAULT.rounds,
    local_epochs: Annotated[
        int, Option(help="Epochs on a device, in a round and in local adaptation.")
    ] = _DEFAULT.local_epochs,
    learning_rate: Annotated[float, Option(help=f"Learning rate on devices. {_SUITED}")] = -1,
    batch_size: Annotated[int, Option(help="Batch size on devices.")] = _DEFAULT.batch_size,
    classes_per_device: Annotated[
        int, Option(help=f"Label skew: m classes a device; 0: the data's own partition. {_SUITED}")
    ] = -1,
    epochs: Annotated[int, Option(help=f"Offline: epochs of the whole model. {_SUITED}")] = -1,
    enhancing_epochs: Annotated[
        int, Option(help=f"Offline: epochs of sub-models as deployed. {_SUITED}")
    ] = -1,
    evaluate_every: Annotated[
        int, Option(help="Rounds between evaluations of all devices.")
    ] = _DEFAULT.evaluate_every,
    seeds: Annotated[str, Option(help="Comma separated seeds.")] = "0",
    engine: Annotated[str, Option(help="ray or in-process.")] = "ray",
    out: Annotated[str, Option(help="Folder for the results.")] = _DEFAULT.out,
    verbose: Annotated[bool, Option(help="Show Flower's log.")] = False,
) -> None:
    """Run strategies on a simulated fleet; leaves results.csv, summary.json and a picture."""
    options = dict(locals())
    verbose, engine = options.pop("verbose"), options.pop("engine")
    if engine not in engines():
        raise SettingsError(f"Expected --engine from {', '.join(engines())}, got '{engine}'.")
    settings = Settings.suited(**options)
    from simulations.engine import run as run_on  # late: bad options are refused in no time

    run_on(settings, engine, verbose=verbose)  # type: ignore[arg-type]


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
