"""Hashes of what arrays hold, so that a file is read as what was written or not at all."""

from __future__ import annotations

import hashlib

import numpy as np


def array_sha256(array: np.ndarray) -> str:
    """sha256 over type, shape and values (in C order) of an array of numbers or text, wherever it lies in memory.

    Raises:
      TypeError: an array of Python objects, which has no bytes of its own.
    """
    if array.dtype.hasobject:
        raise TypeError(f"an array of Python objects has no hash ({array.dtype})")
    # The name tells bfloat16 from other types of two bytes, `str` tells the byte order.
    digest = hashlib.sha256(f"{array.dtype.name} {array.dtype.str} {array.shape}\n".encode())
    digest.update(array.ravel(order="C").view(np.uint8).data)  # bfloat16 is no buffer as it is
    return digest.hexdigest()
