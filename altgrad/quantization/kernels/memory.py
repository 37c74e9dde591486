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

WORDS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.int16, torch.int32: np.int32}
"""What the loops read an element type as: the first two as bits, float16 as the integer that they widen."""


class _Memory:
    def __init__(self, x: Tensor, code: str) -> None:
        self.__array_interface__ = {"data": (x.data_ptr(), False), "shape": (x.numel(),), "typestr": code, "version": 3}


_CODES = {dtype: np.dtype(word).str for dtype, word in WORDS.items()}


def words(x: Tensor) -> Words:
    """The elements of a contiguous CPU tensor, flat, as words; it must outlive the array."""
    if x.numel() == 0:
        return np.empty(0, WORDS[x.dtype])
    return np.asarray(_Memory(x, _CODES[x.dtype]))
