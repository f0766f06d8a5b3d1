"""Ways to break a reply, drawn at random: what `benchmarks.fuzz` lets the cloud read."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Change = Callable[[np.random.Generator, RecordDict], None]


def broken(rng: np.random.Generator, content: RecordDict, changes: list[Change]) -> RecordDict:
    """Copy a reply's content and break it in one to three ways."""
    copied = RecordDict()
    for key, record in content.items():
        copied[key] = (
            ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else record.copy()
        )
    for _ in range(rng.integers(1, 4)):
        changes[rng.integers(len(changes))](rng, copied)
    return copied


def _one(rng: np.random.Generator, things: list) -> object:
    return things[rng.integers(len(things))]


def _junk(rng: np.random.Generator) -> bytes:
    """Draw bytes, some of which look like a file."""
    start = _one(rng, [b"", b"PK\x03\x04", b"\x80\x04\x95", b"\x93NUMPY\x01\x00v\x00", b"{'descr"])
    return start + rng.bytes(int(2 ** rng.uniform(0, 12)))  # type: ignore[operator,no-any-return]


def _number(rng: np.random.Generator) -> float | int:
    """Draw a number nobody expects."""
    special = [0, -1, 1, 2**63 - 1, -(2**63), 2**64 - 1, 1e308, -1e308, 5e-324, 0.0, -0.0, 1e-300]
    special += [math.nan, math.inf, -math.inf, 2**53, 2**53 + 1, 49.5, float(rng.normal())]
    return _one(rng, special)  # type: ignore[return-value]


def _value(rng: np.random.Generator) -> float | int | list:
    if rng.random() < 0.6:
        return _number(rng)
    kind = _one(rng, [int, float])
    drawn = [_number(rng) for _ in range(int(rng.integers(0, 9)))]
    if kind is int:
        return [int(number) if math.isfinite(number) else 7 for number in drawn]
    return [float(number) for number in drawn]


def _header(rng: np.random.Generator) -> bytes:
    """Draw an npy header that promises something else."""
    kinds = ["<f4", ">f4", "<f8", "<c8", "|O", "|V1000000000", "<i8", "<U9", "M8[s]", "f4,f4"]
    shapes = ["()", "(6, 6)", "(3, 6)", "(99999999999999,)", "(-1, 6)", "(True, 6)", "[6, 6]"]
    shapes += ["(0,)", "8", "(((8,),),)", "('8',)", "(6, 6"]
    orders = ["False", "True", "None", "0"]
    dictionary = (
        f"{{'descr': {_one(rng, kinds)!r}, 'fortran_order': {_one(rng, orders)}, "
        f"'shape': {_one(rng, shapes)}, }}"
    )
    text = _one(rng, [dictionary, dictionary * 2, "(" * 100, "[" * 3000, "-" * 3000, "1e999", "\0"])
    length = _one(rng, [118, len(text), 65535, 0])  # type: ignore[arg-type]
    version = _one(rng, [b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"])
    size = int(length).to_bytes(2 if version == b"\x01\x00" else 4, "little")  # type: ignore[call-overload]
    return b"\x93NUMPY" + version + size + text.encode()  # type: ignore[operator,attr-defined,no-any-return]


def _with_data(change: Callable[[np.random.Generator, bytes], bytes]) -> Change:
    """Break the bytes of one array."""

    def apply(rng: np.random.Generator, content: RecordDict) -> None:
        records = list(content.array_records.values())
        if records and records[0]:
            key = _one(rng, list(records[0]))
            good = records[0][key]  # type: ignore[index]
            broken = Array(good.dtype, good.shape, good.stype, change(rng, good.data))
            records[0][key] = broken  # type: ignore[index]

    return apply


def _flip(rng: np.random.Generator, data: bytes, *, header: bool) -> bytes:
    end = min(128, len(data)) if header else len(data)
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9) if end else 0):
        changed[rng.integers(end)] ^= 1 << rng.integers(8)
    return bytes(changed)


def _with_values(change: Callable[[np.random.Generator, np.ndarray], np.ndarray]) -> Change:
    """Break the numbers of one array, in a well-formed file."""

    def apply(rng: np.random.Generator, content: RecordDict) -> None:
        records = list(content.array_records.values())
        if records and records[0]:
            key = _one(rng, list(records[0]))
            try:
                with np.errstate(all="ignore"):
                    broken = np.asarray(change(rng, records[0][key].numpy().copy()))  # type: ignore[index]
            except Exception:  # an earlier change left nothing to read, or no such numbers
                return
            records[0][key] = Array(broken)  # type: ignore[index]

    return apply


def _poke(rng: np.random.Generator, value: np.ndarray) -> np.ndarray:
    if value.size:
        value.flat[rng.integers(value.size)] = _one(rng, [np.nan, np.inf, -np.inf, 3e38, 1e-45])
    return value


def _retype(rng: np.random.Generator, value: np.ndarray) -> np.ndarray:
    names = ["f2", "f4", ">f4", "f8", "i1", "u8", "b1", "S3", "U2"]
    return value.astype(str(_one(rng, names)))


def _reshape(rng: np.random.Generator, value: np.ndarray) -> np.ndarray:
    ways: list[Callable[[], np.ndarray]] = [
        lambda: value.T,
        lambda: value[None],
        lambda: value.reshape(-1),
        lambda: value[:0],
        lambda: value[:1],
        lambda: np.concatenate([value, value]),
        lambda: np.asfortranarray(value),
        lambda: np.zeros(()),
        lambda: np.zeros((2,) * 20, np.int8),
    ]
    return ways[rng.integers(len(ways))]() if value.ndim else value


def _rename(rng: np.random.Generator, content: RecordDict) -> None:
    records = list(content.array_records.values())
    if records and records[0]:
        key = _one(rng, list(records[0]))
        new = [key + "x", "", "body.", "body.1.num_batches_tracked", "selector.heads.bias", "é" * 9]  # type: ignore[operator]
        moved = records[0].pop(key)  # type: ignore[arg-type]
        records[0][_one(rng, new)] = moved  # type: ignore[index]


def _drop_array(rng: np.random.Generator, content: RecordDict) -> None:
    records = list(content.array_records.values())
    if records and records[0]:
        del records[0][_one(rng, list(records[0]))]  # type: ignore[arg-type]


def _add_array(rng: np.random.Generator, content: RecordDict) -> None:
    for record in content.array_records.values():
        for _ in range(rng.integers(1, 50)):
            record[f"body.{rng.integers(1000)}"] = Array(np.zeros(3, np.float32))


def _change_stype(rng: np.random.Generator, content: RecordDict) -> None:
    for record in content.array_records.values():
        for key, good in list(record.items()):
            record[key] = Array("junk", (-1,), str(_one(rng, ["", "pickle"])), good.data)


def _drop_record(rng: np.random.Generator, content: RecordDict) -> None:
    if len(content):
        del content[_one(rng, list(content))]  # type: ignore[arg-type]


def _add_record(rng: np.random.Generator, content: RecordDict) -> None:
    modules = ConfigRecord({"eclm.modules.0": [0, 1, 2, 3]})
    kinds = [ArrayRecord(), MetricRecord(), MetricRecord({"num-examples": 9}), ConfigRecord()]
    kinds += [modules, ConfigRecord({"x": "y" * 2_000_000, "b": b"\0", "l": [True, False]})]
    keys = ["arrays", "metrics", "profile", "config", "", "other"]
    content[str(_one(rng, keys))] = _one(rng, kinds)  # type: ignore[assignment]


def _change_metric(rng: np.random.Generator, content: RecordDict) -> None:
    for record in content.metric_records.values():
        names = [*record, "num-examples", "new", "eclm.importance.0", "eclm.importance.9", ""]
        names += [
            "eclm.modules.0",
            "eclm.modules.1",
            "eclm.cached.0",
            "eclm.device",
            "eclm.mixture",
        ]
        record[str(_one(rng, names))] = _value(rng)  # type: ignore[assignment]


def _drop_metric(rng: np.random.Generator, content: RecordDict) -> None:
    for record in content.metric_records.values():
        if record:
            del record[_one(rng, list(record))]  # type: ignore[arg-type]


def _long_metric(rng: np.random.Generator, content: RecordDict) -> None:
    for record in content.metric_records.values():
        record[str(_one(rng, [*record, "long"]))] = [_number(rng)] * int(2 ** rng.uniform(0, 18))  # type: ignore[list-item]


def _skew_importance(rng: np.random.Generator, content: RecordDict) -> None:
    """Tell a distribution all the same, but a strange one."""
    for record in content.metric_records.values():
        shares = rng.dirichlet(np.full(4, 10.0 ** rng.integers(-3, 3)))
        record["eclm.importance.0"] = [float(share) for share in shares]


def _change_budget(rng: np.random.Generator, content: RecordDict) -> None:
    for record in content.metric_records.values():
        name = _one(rng, ["memory_bytes", "computation_flops", "communication_bytes"])
        record[f"eclm.budget.{name}"] = float(2 ** rng.uniform(0, 20))


_IN_METRICS: list[Change] = [_change_metric, _change_metric, _drop_metric, _long_metric]
_IN_RECORDS: list[Change] = [_drop_record, _add_record]
IN_REPLIES: list[Change] = [
    *_IN_METRICS,
    *_IN_RECORDS,
    _with_data(lambda rng, data: _flip(rng, data, header=False)),
    _with_data(lambda rng, data: _flip(rng, data, header=True)),
    _with_data(lambda rng, data: data[: rng.integers(len(data) + 1)]),
    _with_data(lambda rng, data: data + _junk(rng)),
    _with_data(lambda rng, data: _junk(rng)),
    _with_data(lambda rng, data: _header(rng) + data[128:]),
    _with_values(_poke),
    _with_values(_retype),
    _with_values(_reshape),
    _with_values(lambda rng, value: value * rng.choice([-1, 0, 1, 10, 1e6, 1e38])),
    _rename,
    _drop_array,
    _add_array,
    _change_stype,
]
IN_PROFILES: list[Change] = [*_IN_METRICS, *_IN_RECORDS, _skew_importance, _change_budget]
