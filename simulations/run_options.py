"""Options that commands share with ``run``, so that what can be run can be tuned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import typer

from simulations.presets import read_preset
from simulations.settings import SettingsError, engines


def with_options_of(
    command: Callable[..., None], *, but: Collection[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command all options of another, but some, as its ``**options``.

    Parameters
    ----------
    command : callable
        The other one.
    but : collection of str
        Parameters of it that are left out. Those that both have are the first command's own.
    """
    theirs = inspect.signature(command, eval_str=True).parameters

    def decorate(own_command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(own_command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        names = {parameter.name for parameter in own} | set(but)
        shared = [parameter for name, parameter in theirs.items() if name not in names]
        everything = sorted([*own, *shared], key=lambda p: p.default is not p.empty)
        own_command.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=everything
        )
        return own_command

    return decorate


def with_preset(
    context: typer.Context, options: dict[str, Any], *, but: Collection[str] = ()
) -> dict[str, Any]:
    """Return options with those of the preset they name, where none was given instead.

    Parameters
    ----------
    context : typer.Context
        Knows what was given.
    options : dict[str, Any]
        Of a command; the result lacks ``preset``.
    but : collection of str
        What a preset may say and the command does not take from it.
    """
    options = dict(options)
    if preset := options.pop("preset"):
        for name, value in read_preset(preset).items():
            source = context.get_parameter_source(name)
            # By name: newer versions of typer come with a click, and an enumeration, of their own.
            given = source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")
            if not given and name not in but:
                options[name] = value
    if options.get("engine", engines()[0]) not in engines():
        raise SettingsError(
            f"Expected --engine from {', '.join(engines())}, got '{options['engine']}'."
        )
    return options
