"""The grid a weight lives on: one value for the layer that multiplies by it and the optimizer that moves it.

An optimizer that keeps weights on a format's grid owns their scale, and the layer must round under that very scale, or
it would move the weights again. Both therefore hold one `WeightGrid`: the layer as its own attribute, which copying and
pickling a model carries along, and the optimizer through the Parameter. A Parameter may lose that link (`to_empty`, a
conversion that swaps Parameters, sharding, assignment of another Parameter); it is then found through the live layers.

Weights may be written by anyone between two steps: a checkpoint is loaded, a model is averaged, an initialization runs
again. A grid therefore remembers which memory it last saw, and in which version. Weights that lie on the grid keep the
scale. For others the scale is found anew, which is logged where an optimizer owns it; without an owner the layer goes
back to the rule of its role. Writes through `.data` change no version: on a CPU the bytes at the start, in the
middle and at the end tell of them, on a GPU nothing does.
"""

from __future__ import annotations

import logging
import threading
import weakref
from ctypes import string_at
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.kernels.dispatch import is_traced
from altgrad.quantization.ops import quantize
from altgrad.quantization.scaling import amax, compute_scale, scale_of_amax

HEADROOM = 2.0
"""Of a scale that an optimizer owns: the weights may grow by this factor before they saturate."""

SAMPLE = 64
"""Bytes whose change tells of a write, and the elements looked at before a whole tensor is: weights that were never
rounded fail on these."""

logger = logging.getLogger("altgrad")


Memory = tuple[int, int, bytes]


class LayerWithGrid(Protocol):
    """What multiplies by a weight that has a grid."""

    grid: WeightGrid

    has_run: bool

    @property
    def weight_format(self) -> FloatFormat: ...

    @property
    def holder(self) -> Any: ...

    def parameter(self) -> Any: ...


_LAYERS: weakref.WeakSet[Any] = weakref.WeakSet()
_LOCK = threading.RLock()


class WeightGrid:
    """`fmt`: the weight's format, None while unknown; `scale`: 0-d float32, None where the role's rule decides."""

    def __init__(self) -> None:
        self.fmt: FloatFormat | None = None
        self.scale: Tensor | None = None
        self._is_released = False
        self._owner: weakref.ref[Any] | None = None
        self._seen: Memory | None = None
        self.refits = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no owner: the optimizer that is copied with the model takes possession again."""
        return {"fmt": self.fmt, "scale": self.scale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def join(self, fmt: FloatFormat) -> WeightGrid:
        """This grid, once it is known to have that format; ValueError where the other side has another."""
        if self.fmt not in (None, fmt):
            if not self._is_released and self._is_in_use():
                raise ValueError(self._conflict(fmt))
            self.scale = None
        self.fmt, self._is_released = fmt, False
        return self

    def _is_in_use(self) -> bool:
        with _LOCK:
            return self.is_owned or any(layer.grid is self for layer in _LAYERS)

    def release(self) -> None:
        """The layer is gone. Its format may be chosen again; a layer of the same format finds the same scale."""
        self._is_released = True

    def reformat(self, fmt: FloatFormat) -> None:
        """Another format, whose scale nobody knows yet."""
        self.fmt, self.scale, self._owner, self._seen = fmt, None, None, None

    @property
    def is_owned(self) -> bool:
        """Whether a living optimizer moves the weight."""
        return self._owner is not None and self._owner() is not None

    def is_owned_by(self, owner: object) -> bool:
        """Whether this very optimizer moves the weight."""
        return self._owner is not None and self._owner() is owner

    def own(self, owner: object, fmt: FloatFormat, scale: Tensor | None) -> None:
        """An optimizer takes possession; `scale` None: it keeps a float32 master, whose scale is the role's."""
        self.join(fmt)
        self._owner = weakref.ref(owner)
        self._put(scale)

    def check(self, fmt: FloatFormat) -> None:
        """ValueError where the weight has another format by now than its optimizer."""
        if self.fmt is not fmt and self.fmt not in (None, fmt):
            raise ValueError(self._conflict(fmt))

    def scale_for(self, weight: Tensor) -> Tensor | None:
        """The scale under which `weight` lies on the grid, None for the role's rule; found anew if it was rewritten."""
        if is_traced(weight):
            return self.scale
        if self.scale is None and not self.is_owned and self._seen and self._seen[0] == weight.data_ptr():
            return None  # whatever was written: only weights in new memory may have come with a grid
        seen = memory_of(weight)
        if seen != self._seen:
            self._look(weight, seen)
        if self.scale is not None and self.scale.device != weight.device:
            with torch.inference_mode(False):
                self.scale = self.scale.to(weight.device)
        return self.scale

    def settle(self, memory: Memory) -> None:
        """The weight lies on the grid as its memory is now."""
        self._seen = memory

    @torch.no_grad()
    def refit(self, weight: Tensor) -> bool:
        """Finds the scale of weights that others wrote; returns whether it is another than before."""
        assert self.fmt is not None
        if self.scale is not None and is_on_grid(weight, self.fmt, self.scale.to(weight.device)):
            return False
        before = None if self.scale is None else float(self.scale)
        scale = initial_scale(weight, self.fmt)
        self._put(scale)
        if before is None or before == float(scale):
            return False
        self.refits += 1
        logger.warning(
            "a weight of shape %s was rewritten and does not lie on its grid of %s: scale %g -> %g",
            tuple(weight.shape),
            self.fmt.name,
            before,
            float(scale),
        )
        return True

    def expect_new_weights(self) -> None:
        """The next look takes the weights for ones that were never seen."""
        self._seen = None

    def _look(self, weight: Tensor, seen: Memory) -> None:
        is_new = self._seen is None or self._seen[0] != seen[0]
        self._seen = seen
        if self.is_owned:
            if self.scale is not None:
                self.refit(weight.detach())
            return
        assert self.fmt is not None
        if self.scale is None or not is_on_grid(weight, self.fmt, self.scale.to(weight.device)):
            # A checkpoint of weights on a grid, in a model that no optimizer has moved yet; or the role's rule.
            self._put(scale_on_grid(weight, self.fmt) if is_new else None)

    def _put(self, scale: Tensor | None) -> None:
        # In place, for compiled graphs hold the tensor; an evaluation in inference mode must leave none of its kind.
        with torch.inference_mode(False), torch.no_grad():
            if self.scale is None or scale is None or self.scale.device != scale.device:
                self.scale = None if scale is None else scale.detach().clone()
            else:
                self.scale.copy_(scale)

    def _conflict(self, fmt: FloatFormat) -> str:
        assert self.fmt is not None
        return (
            f"format={fmt.name!r} for a weight that already takes {self.fmt.name}: the layers that share a weight and "
            "its optimizer must agree; give the optimizer a group per format, or use build_optimizer"
        )


def register_layer(layer: LayerWithGrid) -> None:
    """A weight of this layer that has lost its grid finds it again."""
    with _LOCK:
        _LAYERS.add(layer)


def forget_layer(layer: LayerWithGrid) -> None:
    """The layer multiplies by its weight no longer."""
    with _LOCK:
        _LAYERS.discard(layer)


def weight_grid(weight: Any) -> WeightGrid:
    """The grid of the layer that multiplies by this very tensor, or the tensor's own; a new one where it has none."""
    grid = getattr(weight, "grid", None)
    if not isinstance(grid, WeightGrid):
        with _LOCK:
            owners = (layer for layer in _LAYERS if layer.parameter() is weight)
            layer = next(owners, None)
        grid = weight.grid = WeightGrid() if layer is None else layer.grid
    return grid


def converted_weights() -> dict[int, FloatFormat]:
    """The ids of the tensors that living converted layers multiply by, and the formats these have there."""
    with _LOCK:
        return {id(layer.parameter()): layer.weight_format for layer in _LAYERS}


def bypassed_weights() -> tuple[set[int], set[int]]:
    """The ids of weights whose converted layers, all in training, have not run yet, and of those that have."""
    with _LOCK:
        layers = list(_LAYERS)
    idle = {id(layer.parameter()) for layer in layers if layer.holder.training and not layer.has_run}
    ran = {id(layer.parameter()) for layer in layers if layer.has_run}
    return idle - ran - {id(layer.parameter()) for layer in layers if not layer.holder.training}, ran


def memory_of(weight: Tensor) -> Memory:
    """Changes where a tensor's memory was exchanged or written: address, version, on a CPU some of its bytes."""
    local = weight if type(weight) is Parameter else getattr(weight, "_local_tensor", weight)
    address = local.data_ptr()
    is_readable = local.is_cpu and local.is_contiguous()
    sample = b""
    if is_readable and address:
        size = local.nbytes
        last = max(size - SAMPLE, 0)
        sample = string_at(address, min(SAMPLE, size))
        if last:
            sample += string_at(address + last // 2, SAMPLE) + string_at(address + last, SAMPLE)
    return address, -1 if local.is_inference() else local._version, sample


def is_on_grid(weight: Tensor, fmt: FloatFormat, scale: Tensor) -> bool:
    """Whether rounding would change no element; NaN is no change."""
    if weight.is_meta:
        return True
    weight = weight.detach()
    flat = weight.reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLE)]
    return all(bool(((quantize(w, fmt, scale) == w) | w.isnan()).all()) for w in (sample, weight))


def scale_on_grid(weight: Tensor, fmt: FloatFormat) -> Tensor | None:
    """The power of two under which every weight is a value of a format of up to 8 bits; None where there is none.

    A grid of half the scale holds all that the coarser one does within its range, so two looks suffice: with the
    head-room that an optimizer wants, and at the least scale that covers the weights. Weights that are all zero lie on
    every grid, which says nothing.
    """
    if fmt.total_bits > 8 or weight.is_meta:
        return None
    largest = amax(weight)
    if not 0 < float(largest) < torch.inf:
        return None
    scales = (scale_of_amax(largest, fmt, power_of_two=True, headroom=headroom) for headroom in (HEADROOM, 1.0))
    return next((scale for scale in scales if is_on_grid(weight, fmt, scale)), None)


def initial_scale(weight: Tensor, fmt: FloatFormat) -> Tensor:
    """The scale that an optimizer gives weights: 1 for formats wider than 8 bits, else a power of two with head-room,
    or the one whose grid they lie on already."""
    if fmt.total_bits > 8:
        return torch.ones((), dtype=torch.float32, device=weight.device)
    found = scale_on_grid(weight, fmt)
    return compute_scale(weight, fmt, power_of_two=True, headroom=HEADROOM) if found is None else found
