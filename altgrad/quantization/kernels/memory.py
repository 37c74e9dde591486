"""A tensor's memory as numpy sees it, without telling its storage.

`Tensor.numpy()` forbids a storage to be resized for ever, which is how sharding frees a gathered weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[Any]

WORDS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.int16}
"""What the loops read an element type as: the first two as bits, float16 as the integer that they widen."""

VALUES = {torch.float32: np.float32, torch.int32: np.int32}


class _Memory:
    def __init__(self, x: Tensor, code: str) -> None:
        self.__array_interface__ = {"data": (x.data_ptr(), False), "shape": (x.numel(),), "typestr": code, "version": 3}


def words(x: Tensor) -> Words:
    """The elements of a contiguous CPU tensor, flat, as words; it must outlive the array."""
    return _array(x, WORDS[x.dtype])


def values(x: Tensor) -> Words:
    """The elements of a contiguous CPU tensor, flat, as what they are; it must outlive the array."""
    return _array(x, VALUES[x.dtype])


def _array(x: Tensor, kind: type) -> Words:
    return np.asarray(_Memory(x, np.dtype(kind).str)) if x.numel() else np.empty(0, kind)
