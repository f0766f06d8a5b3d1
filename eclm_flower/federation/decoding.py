"""Reading an array that a stranger sent: what it says of itself is checked before it is read.

Only the plain npy format is read, and only if it declares the shape and type that are expected. So
nothing is unpickled or unzipped, and no more memory is used than the expected array takes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array
from numpy.lib import format as npy
from torch import Tensor

from eclm_flower.errors import ReplyError

_MOST_HEADER_BYTES = 4096  # numpy writes 128 for any array a model has
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_array(key: str, array: Array, *, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Decode an array of known shape and type, without copying it.

    Parameters
    ----------
    key : str
        Its name, for the error.
    array : Array
        What came.
    shape, dtype : sequence of int, torch.dtype
        What it has to be. numpy has no bfloat16: that comes as the int16 of the same bits.

    Returns
    -------
    Tensor
        A view of the array's bytes, in their order of memory: not to be written to.

    Raises
    ------
    ReplyError
        It is anything else: unreadable, of another type, shape or size.
    """
    stored = torch.int16 if dtype == torch.bfloat16 else dtype
    expected = torch.empty(0, dtype=stored).numpy().dtype
    payload = math.prod(shape) * expected.itemsize
    if len(array.data) > payload + _MOST_HEADER_BYTES:
        raise ReplyError(
            f"Expected at most {payload:,} bytes in '{key}', got {len(array.data):,}.", "size"
        )
    file = BytesIO(array.data[:_MOST_HEADER_BYTES])
    try:
        declared, fortran, described = _HEADERS[npy.read_magic(file)](file)
    except Exception as error:  # whatever a device may send instead of an array
        raise ReplyError(
            f"Expected '{key}' in the npy format, got bytes that are not ({type(error).__name__}).",
            "arrays",
        ) from error
    if list(declared) != list(shape):
        raise ReplyError(f"Expected '{key}' of shape {list(shape)}, got {list(declared)}.", "shape")
    if described != expected:
        raise ReplyError(f"Expected '{key}' of {expected}, got {described}.", "dtype")
    if len(array.data) - file.tell() != payload:
        raise ReplyError(
            f"Expected {payload:,} bytes of numbers in '{key}', got "
            f"{len(array.data) - file.tell():,}.",
            "size",
        )
    values = np.frombuffer(array.data, dtype=expected, offset=file.tell())
    ordered = values.reshape(tuple(shape), order="F" if fortran else "C")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(ordered)
    return tensor.view(dtype) if stored != dtype else tensor
