"""A part of CIFAR for machines that can't be sent all of it, in the layout of ``--data-dir``.

::

    python -m benchmarks.image_subset cifar10 --data-dir DATA --out PART --train 30000 --test 2500

Rows are drawn from a seed, equally many of every class, and stay in their order. Images stay the
bytes they were; only their file names are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

LABELS = {"cifar10": "label", "cifar100": "fine_label"}


def main(
    dataset: Annotated[str, typer.Argument(help="cifar10 or cifar100.")],
    data_dir: Annotated[Path, typer.Option(help="Where the whole data set is.")],
    out: Annotated[Path, typer.Option(help="Folder for the part.")],
    train: Annotated[int, typer.Option(help="Training images.")],
    test: Annotated[int, typer.Option(help="Test images.")],
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Write a part of a data set."""
    (out / dataset).mkdir(parents=True, exist_ok=True)
    for split, number in (("train", train), ("test", test)):
        file = f"{dataset}/{split}-00000-of-00001.parquet"
        part = balanced(pq.read_table(data_dir / file), LABELS[dataset], number, seed)
        pq.write_table(part, out / file, compression="zstd", compression_level=19)
        print(f"{out / file}: {part.num_rows} images, {(out / file).stat().st_size:,} bytes")


def balanced(table: pa.Table, label: str, number: int, seed: int) -> pa.Table:
    """Keep a number of rows, equally many of every class, of the columns ``img`` and the label."""
    labels = table[label].to_numpy()
    classes = np.unique(labels)
    if number % len(classes):
        raise typer.BadParameter(f"Expected a multiple of {len(classes)} images, got {number}.")
    rng = np.random.default_rng(seed)
    each = number // len(classes)
    rows = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]
    if min(map(len, rows)) < each:
        raise typer.BadParameter(f"Expected at least {each} images of every class.")
    part = table.select(["img", label]).take(np.sort(np.concatenate(rows)))
    images = pc.struct_field(part["img"].combine_chunks(), "bytes")
    unnamed = pa.StructArray.from_arrays([images, pa.nulls(number, pa.string())], ["bytes", "path"])
    place = part.schema.get_field_index("img")
    return part.set_column(place, part.schema.field("img"), unnamed)


if __name__ == "__main__":
    typer.run(main)
