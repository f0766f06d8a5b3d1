"""Presets: options of a run in a TOML file that a user can copy."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from simulations.settings import Settings, SettingsError

FOLDER = Path(__file__).parent / "presets"


def known_presets() -> list[str]:
    """Return the names of the presets that come with the simulations."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """Read the options of a preset.

    Parameters
    ----------
    name : str
        Of a preset that comes along, or the path of a ``.toml``. Keys are options without dashes
        in front, as in ``per-round = 5``.

    Raises
    ------
    SettingsError
        There is no such preset, it can't be read, or it sets what is no option.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise SettingsError(
            f"Expected --preset from {', '.join(known_presets())}, or the path of a .toml, got "
            f"'{name}'."
        )
    try:
        read = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"Can't read the preset {path}: {error}.") from error
    return sound_options(read, f"the preset {path}")


def sound_options(
    given: Mapping[str, Any], what: str, *, but: Collection[str] = ()
) -> dict[str, Any]:
    """Return options with their names as in Python, lists as comma separated text.

    Parameters
    ----------
    given : dict[str, Any]
        As in a file.
    what : str
        Where they stand, for messages.
    but : collection of str
        Options of a run that may not stand there.

    Raises
    ------
    SettingsError
        There is something that is no option.
    """
    options = {key.replace("-", "_"): value for key, value in given.items()}
    known = {field.name for field in fields(Settings)} - {"out", "resume"} | {"engine"}
    if unknown := sorted(set(options) - (known - set(but))):
        raise SettingsError(f"Expected options of a run in {what}, got {', '.join(unknown)}.")
    return {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in options.items()}
