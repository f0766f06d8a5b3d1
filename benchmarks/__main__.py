"""The suite: what a round costs, every benchmark of `docs/performance.md` in turn.

::

    python -m benchmarks --out benchmarks/results/mine
    python -m benchmarks --only merge_rate,derivation --out benchmarks/results/mine

Each runs in a process of its own, as it would alone, and leaves its rows in ``<name>.csv`` of the
folder, whose ``machine.txt`` says where they were measured. The rows committed in
``benchmarks/results`` came one by one.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import psutil
import typer

# Name -> its options; sizes are those of docs/performance.md.
SUITE = {
    "merge_rate": [],
    "derivation": ["--sample", "150", "--solver-seconds", "0.2", "--repeats", "3"],
    "server_round": ["--devices", "10,100,1000", "--window", "16"],
    "fleet_size": [],
    "training_round": ["--rounds", "5"],
    "stacked_training": [],
    "round_bytes": [],
    "round_profile": [],
}
ONE_THREAD = {"training_round"}  # compared with a loop on one thread


def machine() -> str:
    """Name processor, cores, memory and the versions that matter."""
    cpus = Path("/proc/cpuinfo")
    names = cpus.read_text().splitlines() if cpus.exists() else []
    model = next((line.split(":")[1].strip() for line in names if "model name" in line), "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "ray", "numpy"))
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{model or platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; "
        f"Python {platform.python_version()}, {versions}"
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder for the rows.")],
    only: Annotated[str, typer.Option(help="Comma separated benchmarks; else all.")] = "",
) -> None:
    """Run the suite."""
    names = [name for name in only.split(",") if name] or list(SUITE)
    if unknown := [name for name in names if name not in SUITE]:
        raise typer.BadParameter(
            f"Expected --only from {', '.join(SUITE)}, got {', '.join(unknown)}."
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "machine.txt").write_text(f"{machine()}\n")
    print(machine(), flush=True)
    failed = []
    for name in names:
        command = ["-m", f"benchmarks.{name}", *SUITE[name], "--out", str(out / f"{name}.csv")]
        print(f"\npython {' '.join(command)}", flush=True)
        threads = {"OMP_NUM_THREADS": "1"} if name in ONE_THREAD else {}
        if subprocess.run([sys.executable, *command], env={**os.environ, **threads}).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    typer.run(main)
