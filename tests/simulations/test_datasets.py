"""Loading data sets: shapes, scaling, laziness, and errors that say what to do."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from simulations.datasets import DataError, int_column, load_data, log_mel

DATA_DIR = Path(os.environ.get("ECLM_DATA_DIR", Path(__file__).parents[2] / "../shared/data"))


def real(file: str) -> pytest.MarkDecorator:
    """Skip where the real data set is not on this machine."""
    there = (DATA_DIR / file).is_file()
    return pytest.mark.skipif(not there, reason=f"no {file} in ECLM_DATA_DIR ({DATA_DIR})")


def write_npz(folder: Path, **changes: np.ndarray | None) -> str:
    """Write 12 samples of 3 classes, with arrays changed, added or (None) left out."""
    arrays = {
        "x": np.arange(60, dtype=np.float32).reshape(12, 5),
        "y": np.arange(12) % 3,
        **changes,
    }
    path = folder / "own.npz"
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return str(path)


def write_photographs(folder: Path, numbers: int = 6) -> np.ndarray:
    """Write a tiny CIFAR-10 as Parquet; return its training pixels ``[n, 32, 32, 3]``."""
    pixels = np.random.default_rng(0).integers(0, 256, (numbers, 32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in pixels]
    rows = datasets.Dataset.from_dict({"img": images, "label": list(range(numbers))})
    (folder / "cifar10").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(folder / "cifar10" / f"{split}-00000-of-00001.parquet")
    return pixels


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path, write_photographs(tmp_path)


def test_digits_are_built_in_scaled_and_always_split_alike():
    data, again = load_data("digits"), load_data("digits")
    assert (data.num_classes, data.input_shape) == (10, (1, 8, 8))
    assert (len(data.train), len(data.test)) == (1438, 359)
    x, y = data.tensors(data.train)
    assert x.shape == (1438, 1, 8, 8)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)
    assert torch.equal(x, again.tensors(again.train)[0])


def test_every_sample_of_digits_is_in_exactly_one_split():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    x = torch.cat([data.tensors(rows)[0] for rows in (data.train, data.test)]).flatten(1)
    original = np.float32(load_digits().data / 16)
    assert sorted(map(tuple, x.tolist())) == sorted(map(tuple, original.tolist()))


@pytest.mark.parametrize("chosen", [[7, 2, 2, 11], [3, 4, 5], [0], []])
def test_tensors_are_those_of_the_rows_asked_for(tmp_path: Path, chosen: list[int]):
    data = load_data(write_npz(tmp_path, device=np.arange(12) % 2))
    x, y = data.tensors(data.train.select(chosen))
    assert x.tolist() == [[5.0 * row + i for i in range(5)] for row in chosen]
    assert y.tolist() == [row % 3 for row in chosen]


def test_npz_test_rows_and_devices_are_kept_apart_and_renumbered(tmp_path: Path):
    test = np.arange(12) >= 8
    data = load_data(write_npz(tmp_path, test=test, device=np.array([40, 7, 99] * 4)))
    assert data.test is not None
    assert (len(data.train), len(data.test), data.num_classes) == (8, 4, 3)
    assert int_column(data.train, "device").tolist() == [1, 0, 2, 1, 0, 2, 1, 0]
    assert int_column(data.test, "device").tolist() == [2, 1, 0, 2]
    assert data.tensors(data.test)[0][:, 0].tolist() == [40, 45, 50, 55]


def test_npz_with_devices_and_no_test_rows_has_no_pool(tmp_path: Path):
    assert load_data(write_npz(tmp_path, device=np.arange(12) % 2)).test is None


def test_npz_with_neither_keeps_a_fifth_as_pool(tmp_path: Path):
    data = load_data(write_npz(tmp_path))
    assert (len(data.train), len(data.test)) == (10, 2)
    assert "device" not in data.train.column_names


@pytest.mark.parametrize(
    ("x", "shape", "factor"),
    [
        (np.full((12, 4, 6), 255, np.uint8), (1, 4, 6), 1 / 255),
        (np.full((12, 4, 6), 255, np.float32), (1, 4, 6), 1),
        (np.full((12, 4, 6, 3), 255, np.uint8), (3, 4, 6), 1 / 255),
        (np.full((12, 3, 4, 6), 255, np.uint8), (3, 4, 6), 1 / 255),
        (np.full((12, 4, 6, 3), 255, np.float64), (4, 6, 3), 1),
        (np.full((12, 9), 255, np.int64), (9,), 1),
    ],
)
def test_npz_shapes_and_scales(
    tmp_path: Path, x: np.ndarray, shape: tuple[int, ...], factor: float
):
    data = load_data(write_npz(tmp_path, x=x))
    assert data.input_shape == shape
    tensor, _ = data.tensors(data.train)
    assert torch.allclose(tensor, torch.full((10, *shape), 255.0 * factor))


def test_npz_colour_images_become_channel_first(tmp_path: Path):
    x = np.random.default_rng(0).integers(0, 256, (12, 4, 6, 3), dtype=np.uint8)
    data = load_data(write_npz(tmp_path, x=x, device=np.zeros(12, int)))
    expected = torch.from_numpy(x).permute(0, 3, 1, 2) / 255
    assert torch.allclose(data.tensors(data.train)[0], expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y": None}, r"\['y'\]"),
        ({"x": None}, r"\['x'\]"),
        ({"y": np.arange(11) % 3}, r"'y': \(11,\)"),
        ({"device": np.zeros(5, int)}, r"'device': \(5,\)"),
        ({"y": np.array([3, 7, 9] * 4)}, "3, 7, 9"),
        ({"y": np.array([0, 2] * 6)}, "0, 2"),
        ({"y": np.array([-1, 0, 1] * 4)}, "-1, 0, 1"),
        ({"y": np.zeros(12, int)}, "C at least 2"),
        ({"y": np.arange(12) % 3 * 1.0}, "float64"),
        ({"x": np.full((12, 5), np.nan)}, "60 NaN"),
        ({"x": np.arange(12.0)}, r"\[n, ...\]"),
        ({"x": np.full((12, 2), "a")}, "numbers"),
        ({"x": np.full((12, 2), None)}, "plain arrays"),
        ({"test": np.arange(12)}, "boolean 'test'"),
        ({"test": np.zeros(12, bool)}, "not for all"),
        ({"test": np.ones(12, bool)}, "not for all"),
    ],
)
def test_npz_errors_name_what_is_wrong(tmp_path: Path, changes: dict, said: str):
    with pytest.raises(DataError, match=said):
        load_data(write_npz(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 and then nothing"])
def test_a_file_that_is_no_npz(tmp_path: Path, content: bytes):
    path = tmp_path / "own.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"Could not read .*own\.npz"):
        load_data(str(path))


def test_an_array_file_that_is_no_archive(tmp_path: Path):
    with (tmp_path / "own.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"Could not read .*own\.npz"):
        load_data(str(tmp_path / "own.npz"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hapt", "hapt/hapt_features.npz"),
        ("speech", "fsdd/fsdd.npz"),
        ("mnist", "mnist/mnist.npz"),
        ("cifar10", "cifar10/train-00000-of-00001.parquet"),
        ("cifar100", "cifar100/train-00000-of-00001.parquet"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, file: str):
    with pytest.raises(DataError, match=str(tmp_path / file)) as caught:
        load_data(name, tmp_path)
    assert "--data-dir" in str(caught.value)


@pytest.mark.parametrize("name", ["hapt", "speech"])
def test_what_has_no_download_asks_for_a_folder(name: str):
    with pytest.raises(DataError, match="--data-dir"):
        load_data(name)


def test_unknown_names():
    with pytest.raises(DataError, match=r"digits, hapt, cifar10.*got 'cifar'"):
        load_data("cifar")
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        load_data("nowhere.npz")


def test_photographs_are_normalised_channel_first(photographs: tuple[Path, np.ndarray]):
    folder, pixels = photographs
    data = load_data("cifar10", folder)
    assert data.train.column_names == ["x", "label"]
    x, y = data.tensors(data.train.select([4, 1]))
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    expected = ((pixels[[4, 1]] / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-5)
    assert y.tolist() == [4, 1]
    assert data.tensors(data.train.select([2]))[0].shape == (1, 3, 32, 32)


def test_photographs_are_decoded_only_when_asked_for(
    photographs: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    decoded = []
    decode = datasets.Image.decode_example

    def count(self: datasets.Image, value: dict, **more: object) -> Image.Image:
        decoded.append(value)
        return decode(self, value, **more)

    monkeypatch.setattr(datasets.Image, "decode_example", count)
    data = load_data("cifar10", photographs[0])
    int_column(data.train, "label")
    assert len(decoded) == 0
    data.tensors(data.train.select([5, 0, 3]))
    assert len(decoded) == 3


def test_photographs_can_be_decoded_once_for_all(
    photographs: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    data = load_data("cifar10", photographs[0])
    kept = data.decoded()
    expected = data.tensors(data.test.select([5, 0, 3]))
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded again")
    )
    for mine, theirs in zip(kept.tensors(kept.test.select([5, 0, 3])), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert kept.train.column_names == ["x", "label"]
    digits = load_data("digits")
    assert digits.decoded() is digits


def test_a_folder_and_hugging_face_give_the_same_samples(
    photographs: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    load = datasets.load_dataset
    files = {
        split: str(photographs[0] / "cifar10" / f"{split}-00000-of-00001.parquet")
        for split in ("train", "test")
    }
    local = load_data("cifar10", photographs[0])
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: load("parquet", data_files=files))
    hub = load_data("cifar10")
    for mine, theirs in zip(local.tensors(local.train), hub.tensors(hub.train), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_an_image_and_what_is_not(tmp_path: Path):
    assert load_data("digits").images
    assert not load_data(write_npz(tmp_path)).images
    assert load_data(write_npz(tmp_path, x=np.zeros((12, 4, 6), np.uint8))).images


def test_a_broken_parquet_file(photographs: tuple[Path, np.ndarray]):
    path = photographs[0] / "cifar10" / "train-00000-of-00001.parquet"
    path.write_bytes(b"no Parquet at all")
    with pytest.raises(DataError, match=f"Could not load {path}"):
        load_data("cifar10", photographs[0])


@pytest.mark.parametrize(
    ("name", "hub", "columns"),
    [
        ("cifar10", "uoft-cs/cifar10", ("img", "label")),
        ("cifar100", "uoft-cs/cifar100", ("img", "fine_label")),
        ("mnist", "ylecun/mnist", ("image", "label")),
    ],
)
def test_without_a_folder_hugging_face_is_asked(
    monkeypatch: pytest.MonkeyPatch, name: str, hub: str, columns: tuple[str, str]
):
    asked = []
    side = 28 if name == "mnist" else 32
    image = Image.new("L" if name == "mnist" else "RGB", (side, side))

    def answer(path: str, **_: object) -> datasets.DatasetDict:
        asked.append(path)
        rows = datasets.Dataset.from_dict({columns[0]: [image], columns[1]: [3], "more": [0]})
        return datasets.DatasetDict(train=rows, test=rows)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    data = load_data(name)
    assert asked == [hub]
    x, y = data.tensors(data.train)
    assert x.shape == (1, *data.input_shape)
    assert y.tolist() == [3]


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"uoft-cs/cifar10: no route; connect .* --data-dir"):
        load_data("cifar10")


def test_log_mel_places_a_tone_in_its_band_and_frames():
    seconds = np.arange(4000) / 8000
    tones = [np.sin(2 * np.pi * hertz * seconds) * 20000 for hertz in (300, 3000)]
    wave = np.concatenate(tones).astype(np.int16)
    pictures = log_mel(wave, np.array([0, 4000, 8000]))
    assert pictures.shape == (2, 1, 32, 32)
    low, high = pictures[:, 0, :, 8].argmax(axis=1)
    assert 4 <= low <= 6
    assert 26 <= high <= 28
    assert np.allclose(pictures[:, :, :, 18:], np.log(1e-4))  # half a second, then silence


@real("hapt/hapt_features.npz")
def test_hapt_is_six_activities_of_30_people():
    data = load_data("hapt", DATA_DIR)
    assert data.test is None
    assert (len(data.train), data.num_classes, data.input_shape) == (10411, 6, (415,))
    assert np.unique(int_column(data.train, "device")).tolist() == list(range(30))
    x, _ = data.tensors(data.train)
    assert x.mean().abs() < 0.1
    assert 0.9 < x.std() < 1.1


@real("cifar10/train-00000-of-00001.parquet")
@real("cifar100/train-00000-of-00001.parquet")
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_photographs(name: str, classes: int):
    data = load_data(name, DATA_DIR)
    assert data.test is not None
    assert (len(data.train), len(data.test), data.num_classes) == (50000, 10000, classes)
    counts = np.bincount(int_column(data.train, "label"))
    assert counts.tolist() == [50000 // classes] * classes
    x, y = data.tensors(data.test.select(range(200)))
    assert x.shape == (200, 3, 32, 32)
    assert y.shape == (200,)
    assert x.mean().abs() < 0.15
    assert 0.9 < x.std() < 1.1


@real("fsdd/fsdd.npz")
def test_speech_has_speakers_and_the_official_test_rows():
    data = load_data("speech", DATA_DIR)
    assert data.test is not None
    assert (len(data.train), len(data.test), data.input_shape) == (2700, 300, (1, 32, 32))
    assert np.bincount(int_column(data.test, "device")).tolist() == [50] * 6
    x, _ = data.tensors(data.train)
    assert x.mean().abs() < 0.01
    assert 0.99 < x.std() < 1.01
    assert not data.images


def test_images_at_a_lower_resolution_are_means_of_their_pixels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x=images, y=np.arange(12) % 2)
    whole = load_data(str(tmp_path / "own.npz"))
    half = load_data(str(tmp_path / "own.npz"), resolution=4)
    assert half.input_shape == (3, 4, 4)
    (x, y), (small, same) = whole.tensors(whole.train), half.tensors(half.train)
    assert small.shape[1:] == (3, 4, 4)
    assert torch.equal(y, same)
    torch.testing.assert_close(small[:, :, 0, 1], x[:, :, :2, 2:4].mean(dim=(2, 3)))


@pytest.mark.parametrize("resolution", [3, 16])
def test_a_resolution_that_does_not_divide_is_refused(tmp_path, resolution):
    np.savez(tmp_path / "own.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.arange(4) % 2)
    with pytest.raises(DataError, match=f"divides the sides of images, got {resolution}"):
        load_data(str(tmp_path / "own.npz"), resolution=resolution)


def test_vectors_have_no_resolution(tmp_path):
    np.savez(tmp_path / "own.npz", x=np.zeros((4, 8), np.float32), y=np.arange(4) % 2)
    with pytest.raises(DataError, match="sides of images"):
        load_data(str(tmp_path / "own.npz"), resolution=4)
