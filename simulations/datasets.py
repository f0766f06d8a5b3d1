"""Labelled data sets by name, all in one shape.

What: :func:`load_data` turns a name into a :class:`LabelledData`: rows with ``x``, ``label`` and,
where the data has a natural partition (a person, a speaker), ``device``. Why: environments,
strategies and models need not know where data came from. Images stay compressed until
:meth:`LabelledData.tensors` is asked for rows, so a device with 100 photographs decodes 100.

Sources: digits (scikit-learn's copy of the UCI optical digits), CIFAR-10 and CIFAR-100 (Krizhevsky
2009), MNIST (LeCun et al. 1998), HAPT (Reyes-Ortiz et al. 2015), FSDD for ``speech`` (Jackson et
al.: ten spoken digits, where the paper uses Google Speech Commands), or one's own ``.npz``.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from flwr_datasets import FederatedDataset
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class DataError(ValueError):
    """Data, or a demand on it, that cannot be met: the message names cause, value and remedy."""


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """One data set.

    Attributes
    ----------
    name : str
        The name it was asked for by.
    train : datasets.Dataset
        Columns ``x``, ``label`` (int, 0 to C-1) and, where there is a natural partition,
        ``device`` (int, 0 to D-1).
    test : datasets.Dataset | None
        The shared test pool, same columns. None where the data is naturally partitioned and names
        no test rows: then every device keeps a part of its own.
    num_classes : int
        C.
    input_shape : tuple[int, ...]
        Of one sample as a tensor, without the batch axis.
    images : bool
        Samples are images ``[channels, y, x]``, not vectors or spectrograms.
    mean, std : tuple[float, ...]
        Subtracted and divided by: one value, or one for each channel (axis 0 of a sample).
    pooled : int
        Images: how many pixels of each direction are averaged to one; see `at`.
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset | None
    num_classes: int
    input_shape: tuple[int, ...]
    images: bool
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pooled: int = 1

    def at(self, resolution: int) -> Self:
        """Return the same images at a lower resolution.

        Parameters
        ----------
        resolution : int
            Pixels of the longer side; divides it.

        Raises
        ------
        DataError
            The samples are no images, or of a size that this does not divide.
        """
        channels, *sides = self.input_shape
        factor = max(1, max(sides, default=0) // resolution)
        if not self.images or max(sides) != factor * resolution or any(s % factor for s in sides):
            raise DataError(
                f"Expected a resolution that divides the sides of images, got {resolution} for "
                f"samples of shape {list(self.input_shape)}; leave it out to take them as they are."
            )
        shape = (channels, *(side // factor for side in sides))
        return replace(self, input_shape=shape, pooled=self.pooled * factor)

    def tensors(self, rows: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode and normalise the given rows, and only these.

        Parameters
        ----------
        rows : datasets.Dataset
            A selection of n rows of ``train`` or ``test``.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            x: float32 ``[n, *input_shape]``; y: int64 ``[n]``.
        """
        raw: NDArray[Any] = np.zeros(0, np.float32)
        if len(rows) and isinstance(rows.features["x"], datasets.Image):
            raw = _pixels(rows)
        elif len(rows):
            cells = rows.select_columns("x").with_format("arrow")[:]["x"].combine_chunks()
            raw = cells.flatten().to_numpy(zero_copy_only=False)
        stored = [self.input_shape[0], *(side * self.pooled for side in self.input_shape[1:])]
        x = torch.from_numpy(np.array(raw, np.float32).reshape(len(rows), *stored))
        if raw.dtype == np.uint8:
            x /= 255
        channels = (-1, *[1] * (len(self.input_shape) - 1))
        x -= torch.tensor(self.mean).view(channels)
        x /= torch.tensor(self.std).view(channels)
        if self.pooled > 1:
            x = F.avg_pool2d(x, self.pooled)
        return x, torch.from_numpy(int_column(rows, "label"))

    def decoded(self) -> LabelledData:
        """Decode all images now and keep them: for devices too many to decode anew at each visit.

        A byte for each pixel and channel; what `tensors` returns stays the same.
        """

        def kept(rows: datasets.Dataset) -> datasets.Dataset:
            columns = {c: rows.with_format("arrow")[:][c] for c in rows.column_names if c != "x"}
            table = pa.table({"x": _fixed_size(_pixels(rows)), **columns})
            # Named, because finding a name takes a hundred times the data's memory.
            return datasets.Dataset(table, fingerprint=f"{self.name} decoded")

        if not isinstance(self.train.features["x"], datasets.Image):
            return self
        test = None if self.test is None else kept(self.test)
        return replace(self, train=kept(self.train), test=test)


def _pixels(rows: datasets.Dataset) -> NDArray[Any]:
    """Decode images: ``[n, H, W]``, or ``[n, C, H, W]``."""
    raw: NDArray[Any] = rows.select_columns("x").with_format("numpy")[:]["x"]  # [n, H, W(, C)]
    return raw if raw.ndim == 3 else np.moveaxis(raw, -1, 1)


def _fixed_size(x: NDArray[Any]) -> pa.FixedSizeListArray:
    """Put samples ``[n, ...]`` into a column: it keeps their dtype, and rows are cut out of it."""
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), int(np.prod(x.shape[1:])))


def int_column(rows: datasets.Dataset, name: str) -> NDArray[np.int64]:
    """One integer column, int64 ``[n]``; nothing else is read, so no image is decoded."""
    if not len(rows):
        return np.zeros(0, np.int64)
    column = rows.select_columns(name).with_format("arrow")[:][name]
    return np.array(column.to_numpy(), dtype=np.int64)


def load_data(
    name: str, data_dir: Path | None = None, resolution: int | None = None
) -> LabelledData:
    """Load a data set by name, or from a path that ends in ``.npz``.

    Parameters
    ----------
    name : str
        ``digits``, ``hapt``, ``cifar10``, ``cifar100``, ``mnist``, ``speech``, or the path of a
        ``.npz`` with ``x`` ``[n, ...]``, ``y`` ``[n]`` and optionally ``device`` ``[n]`` and
        boolean ``test`` ``[n]``. ``x`` of ``[n, H, W]`` becomes ``[n, 1, H, W]``; uint8 is scaled
        by 1/255, and uint8 ``[n, H, W, C]`` with C of 1 or 3 becomes channel-first; everything
        else is kept. With neither ``device`` nor ``test``, a fixed fifth of the rows is the pool.
    data_dir : Path | None (default: None)
        The folder that holds one folder for each data set (``cifar10/``, ``hapt/``, ``fsdd/``,
        ...). None: ``digits`` is built in, CIFAR and MNIST come from Hugging Face.
    resolution : int | None (default: None)
        Shrink images so that their longer side has so many pixels; None: as they are.

    Raises
    ------
    DataError
        If the name is unknown, a file is missing or broken, or a download failed.

    Notes
    -----
    Switches off the progress bars of ``datasets`` in this process.
    """
    datasets.disable_progress_bars()
    if resolution is not None:
        return load_data(name, data_dir).at(resolution)
    if name.endswith(".npz"):
        return _own_npz(Path(name))
    if name not in _LOADERS:
        known = ", ".join(_LOADERS)
        raise DataError(f"Expected a data set out of {known}, or a path to a .npz, got {name!r}.")
    return _LOADERS[name](None if data_dir is None else Path(data_dir))


# Data that arrives as arrays


def _from_arrays(
    name: str,
    arrays: Arrays,
    *,
    images: bool = True,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> LabelledData:
    """Build from checked ``x`` ``[n, ...]``, ``y`` ``[n]``, optional ``device`` and ``test``."""
    x, y, test = arrays["x"], arrays["y"], arrays.get("test")
    columns = {"x": _fixed_size(x), "label": pa.array(y.astype(np.int64))}
    if "device" in arrays:
        device = np.unique(arrays["device"], return_inverse=True)[1]
        columns["device"] = pa.array(device.astype(np.int64))
    elif test is None:
        test = np.random.default_rng([0, *b"test pool"]).permutation(len(y)) < len(y) // 5
    rows = pa.table(columns)
    return LabelledData(
        name=name,
        train=datasets.Dataset(rows if test is None else rows.filter(pa.array(~test))),
        test=None if test is None else datasets.Dataset(rows.filter(pa.array(test))),
        num_classes=int(y.max()) + 1,
        input_shape=tuple(x.shape[1:]),
        images=images and x.ndim == 4,
        mean=mean,
        std=std,
    )


def _read_npz(path: Path, keys: tuple[str, ...], remedy: str) -> Arrays:
    """Read all arrays of a ``.npz``, without pickles, and insist on some."""
    if not path.is_file():
        raise DataError(f"Expected a data file at {path}, but there is none; {remedy}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"Could not read {path}: {error}; write it with numpy.savez and plain arrays."
        ) from error
    if missing := [key for key in keys if key not in arrays]:
        raise DataError(f"Expected the arrays {missing} in {path}, got {list(arrays)}; add them.")
    return arrays


def _expect(fine: bool, path: Path, expected: str, got: object, remedy: str) -> None:
    if not fine:
        raise DataError(f"Expected {expected} in {path}, got {got}; {remedy}.")


def _own_npz(path: Path) -> LabelledData:
    arrays = _read_npz(path, ("x", "y"), "check the path")
    arrays = {key: arrays[key] for key in ("x", "y", "device", "test") if key in arrays}
    x, y = arrays["x"], arrays["y"]
    shapes = {key: array.shape for key, array in arrays.items()}
    one_length = x.ndim > 1 and all(shapes[key] == (len(x),) for key in shapes if key != "x")
    wanted = "'x' of shape [n, ...], and 'y', 'device' and 'test' of shape [n]"
    _expect(one_length and x.size > 0, path, wanted, shapes, "give every sample one entry in each")
    _expect(x.dtype.kind in "biuf", path, "numbers as 'x'", x.dtype, "convert it to float32")
    if x.dtype.kind == "f":
        bad = int((~np.isfinite(x)).sum())
        _expect(bad == 0, path, "finite 'x'", f"{bad} NaN or infinite values", "clean them")
    values = np.unique(y)
    fine = y.dtype.kind in "iu" and np.array_equal(values, np.arange(max(2, len(values))))
    got = (
        f"{y.dtype} values {', '.join(map(str, values[:12]))}{', ...' if len(values) > 12 else ''}"
    )
    remedy = "renumber them with numpy.unique(y, return_inverse=True)[1]"
    _expect(fine, path, "integers 0 to C-1 as 'y', each used and C at least 2", got, remedy)
    if "test" in arrays:
        test = arrays["test"]
        fine = test.dtype == bool and 0 < test.sum() < len(test)
        got = f"{test.dtype} values {np.unique(test)[:5]}"
        remedy = "correct it, or leave it out"
        _expect(fine, path, "a boolean 'test', true for some rows and not for all", got, remedy)
    if x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] in (1, 3):
        x = np.moveaxis(x, -1, 1)
    x = x[:, None] if x.ndim == 3 else x
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    return _from_arrays(str(path), {**arrays, "x": x})


def _digits(_: Path | None) -> LabelledData:
    from sklearn.datasets import load_digits

    images, y = load_digits(return_X_y=True)  # [1797, 64], 0 to 16
    return _from_arrays("digits", {"x": np.float32(images / 16).reshape(-1, 1, 8, 8), "y": y})


def _only_local(name: str, data_dir: Path | None, file: str, keys: tuple[str, ...]) -> Arrays:
    remedy = f"give --data-dir the folder that holds {file}"
    if data_dir is None:
        raise DataError(f"Expected a data folder for {name}, which has no download; {remedy}.")
    return _read_npz(data_dir / file, keys, remedy)


def _hapt(data_dir: Path | None) -> LabelledData:
    keys = ("features", "feature_mean", "feature_std", "label", "subject")
    z = _only_local("hapt", data_dir, "hapt/hapt_features.npz", keys)
    six = z["label"] < 6  # the activities; 6 to 11 are short transitions between them
    x = (z["features"] - z["feature_mean"]) / z["feature_std"]
    # The published split is by person. Here every person trains and tests, so it is left out.
    return _from_arrays("hapt", {"x": x[six], "y": z["label"][six], "device": z["subject"][six]})


def _speech(data_dir: Path | None) -> LabelledData:
    keys = ("wave", "offset", "label", "speaker", "test")
    z = _only_local("speech", data_dir, "fsdd/fsdd.npz", keys)
    x, test = log_mel(z["wave"], z["offset"]), z["test"]
    scale = {"mean": (float(x[~test].mean()),), "std": (float(x[~test].std()),)}
    arrays = {"x": x, "y": z["label"], "device": z["speaker"], "test": test}
    return _from_arrays("speech", arrays, images=False, **scale)


def log_mel(wave: NDArray[np.int16], offset: NDArray[np.int64]) -> NDArray[np.float32]:
    """Log-mel pictures of the first second of each 8 kHz recording, zero-padded where shorter.

    32 frames of 64 ms (Hann, 250 samples apart) by 32 triangular mel bands from 60 Hz to 4 kHz.

    Parameters
    ----------
    wave : NDArray[np.int16]
        All recordings, one after the other.
    offset : NDArray[np.int64]
        ``[n + 1]``: recording i is ``wave[offset[i]:offset[i + 1]]``.

    Returns
    -------
    NDArray[np.float32]
        ``[n, 1, 32 bands, 32 frames]``, natural logarithm of the power in each band.
    """
    second, hop, width, bands = 8000, 250, 512, 32
    lowest, highest = 1127 * np.log1p(60 / 700), 1127 * np.log1p(4000 / 700)  # mel
    edges = 700 * np.expm1(np.linspace(lowest, highest, bands + 2) / 1127)  # Hz
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hertz = np.fft.rfftfreq(width, 1 / 8000)
    triangles = np.clip(
        np.minimum((hertz - low) / (peak - low), (high - hertz) / (high - peak)), 0, 1
    )
    starts, stops = offset[:-1], offset[1:]
    x = np.empty((len(starts), 1, bands, second // hop), np.float32)
    for batch in np.array_split(np.arange(len(starts)), max(1, len(starts) // 256)):
        at = starts[batch, None] + np.arange(second)
        inside = at < stops[batch, None]
        sound = np.where(inside, wave[np.minimum(at, len(wave) - 1)], 0) / np.float32(32768)
        sound = np.pad(sound, ((0, 0), (width // 2, width // 2)))
        frames = np.lib.stride_tricks.sliding_window_view(sound, width, axis=1)[:, :second:hop]
        power = np.abs(np.fft.rfft(frames * np.hanning(width).astype(np.float32))) ** 2
        x[batch, 0] = np.log(triangles @ power.transpose(0, 2, 1) + 1e-4)
    return x


# Images, in Parquet files here or on Hugging Face


@dataclass(frozen=True, kw_only=True)
class _Images:
    """Where the images are, and the channel statistics of the training images (0 to 1)."""

    name: str
    hub: str
    image: str = "img"
    label: str = "label"
    num_classes: int = 10
    input_shape: tuple[int, ...] = (3, 32, 32)
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def load(self, data_dir: Path | None) -> LabelledData:
        """Read both splits through flwr-datasets, whichever place they lie in."""
        source, remedy = self.hub, "connect to the network, or give --data-dir a folder that has it"
        files: dict[str, str] = {}
        if data_dir is not None:
            source, remedy = "parquet", f"leave out --data-dir to download {self.hub}"
            for split in ("train", "test"):
                path = data_dir / self.name / f"{split}-00000-of-00001.parquet"
                files[split] = str(path)
                if not path.is_file():
                    raise DataError(
                        f"Expected the {split} images at {path}, but there is no such file; give "
                        f"--data-dir the folder that holds {self.name}/, or {remedy}."
                    )
        try:
            with warnings.catch_warnings():  # about data sets that Flower didn't test
                warnings.simplefilter("ignore")
                options = {"data_files": files} if files else {}
                source_data = FederatedDataset(
                    dataset=source, partitioners={"train": 1}, shuffle=False, **options
                )
                train, test = (self._split(source_data.load_split(s)) for s in ("train", "test"))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            place = ", ".join(files.values()) or self.hub
            raise DataError(f"Could not load {place}: {error}; {remedy}.") from error
        return LabelledData(
            name=self.name,
            train=train,
            test=test,
            num_classes=self.num_classes,
            input_shape=self.input_shape,
            images=True,
            mean=self.mean,
            std=self.std,
        )

    def _split(self, rows: datasets.Dataset) -> datasets.Dataset:
        names = {self.image: "x", self.label: "label"}
        rows = rows.select_columns(list(names))
        return rows.rename_columns({old: new for old, new in names.items() if old != new})


_CIFAR10 = _Images(
    name="cifar10",
    hub="uoft-cs/cifar10",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_CIFAR100 = _Images(
    name="cifar100",
    hub="uoft-cs/cifar100",
    label="fine_label",
    num_classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)
_MNIST = _Images(
    name="mnist",
    hub="ylecun/mnist",
    image="image",
    input_shape=(1, 28, 28),
    mean=(0.1307,),
    std=(0.3081,),
)


def _mnist(data_dir: Path | None) -> LabelledData:
    if data_dir is None:
        return _MNIST.load(None)
    keys = ("x_train", "y_train", "x_test", "y_test")
    remedy = f"put it there, or leave out --data-dir to download {_MNIST.hub}"
    z = _read_npz(data_dir / "mnist/mnist.npz", keys, remedy)
    x, y = (np.concatenate([z[f"{key}_train"], z[f"{key}_test"]]) for key in "xy")
    arrays = {"x": x[:, None], "y": y, "test": np.arange(len(y)) >= len(z["y_train"])}
    return _from_arrays("mnist", arrays, mean=_MNIST.mean, std=_MNIST.std)


_LOADERS: dict[str, Callable[[Path | None], LabelledData]] = {
    "digits": _digits,
    "hapt": _hapt,
    "cifar10": _CIFAR10.load,
    "cifar100": _CIFAR100.load,
    "mnist": _mnist,
    "speech": _speech,
}
