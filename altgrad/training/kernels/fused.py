"""The compiled step: one loop over a tensor for everything a plan asks, so that arithmetic hides behind memory.

A loop per combination of choices, made and compiled when it is first asked for, and kept on disk. The tensors of a
group come as addresses in a table, a row each, so that one call steps them all, however small they are. A tensor is
first surveyed (is the gradient finite; the largest weight and the mean spacing where the step needs them), then
stepped in pieces, small enough for counts in 32 bits. While a piece is stepped, as many gradients of later tensors
are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from altgrad.quantization.kernels.compiled import compiled, inlined
from altgrad.quantization.kernels.loops import (
    _bits,
    _constants,
    _drawn,
    _finished,
    _float,
    _hash,
    _load,
    _nearest,
    _plus,
    _right,
    _store,
    largest_bits,
    mixed,
    pointer_to,
    splitmix64,
)
from altgrad.training.kernels import (
    FIXED,
    GRADIENT_FLOOR,
    MEAN_EVERY,
    OVERFLOW_SHARE,
    OVERFLOW_STEPS,
    Count,
    Counting,
    Geometry,
    Moments,
    Placement,
)
from altgrad.training.kernels import layout as at
from altgrad.training.kernels.elements import (
    HALF,
    LOW,
    absolute,
    binade_of,
    binade_of_quotient,
    clipped,
    code_on_grid,
    drawn,
    gap_at,
    index_of,
    minimum,
    minus,
    power,
    share_word,
    size_of,
    stiffness,
    value_of,
    whole_sum,
)
from altgrad.training.kernels.survey import look, mean_of, scale_of

_U32, _F32, _I32, _I64, _F64 = np.uint32, np.float32, np.int32, np.int64, np.float64
_ABSOLUTE, _INFINITY = _U32(0x7FFFFFFF), _U32(0x7F800000)
_GIVEN, _ADAM, _ALL = int(Moments.GIVEN), int(Moments.ADAM), int(Counting.ALL)
_RELATIVE, _ULP, _BY_GRADIENT = int(Geometry.RELATIVE), int(Geometry.ULP), int(Geometry.GRADIENT)
_MASTER, _NEAREST, _RUNGS = int(Placement.MASTER), int(Placement.NEAREST), int(Placement.RUNGS)
_FLIPS, _APPLIED, _GRADIENT, _EXPECTED = int(Count.FLIPS), int(Count.APPLIED), int(Count.GRADIENT), int(Count.EXPECTED)
_OVERFLOW, _RESCALED, _SKIPPED = int(Count.OVERFLOW), int(Count.RESCALED), int(Count.SKIPPED)
_TRAVEL, _POSITION = int(Count.TRAVEL), int(Count.POSITION)


@intrinsic
def _wide_vectors(typingctx):
    """Lets the function that calls this use 512-bit vectors, where LLVM would keep to 256 on some processors."""

    def generate(context, builder, signature, args):
        for attribute in ('"prefer-vector-width"="512"', '"min-legal-vector-width"="512"'):
            set.add(builder.function.attributes, attribute)
        return context.get_dummy_value()

    return types.none(), generate


@inlined
def _scaled(x, scale, inverse, divides):
    return _F32(x / scale) if divides else _F32(x * inverse)


@compiled
def _requantize(words, scale, is_nearest, seed, grid_words):
    c, scale, keys = _constants(grid_words), _F32(scale), splitmix64(seed)
    key, second_key = _U32(keys & np.uint64(0xFFFFFFFF)), _U32(keys >> np.uint64(32))
    for i in range(words.size):
        bits = _bits(_F32(_load(words[i]) / scale))
        magnitude = _U32(bits & _ABSOLUTE)
        draw = _right(_hash(_U32(i), key, second_key), _U32(1))
        rounded = _nearest(magnitude, c) if is_nearest else _drawn(magnitude, draw, c)
        words[i] = _store(_F32(_finished(bits, rounded, c) * scale), words[i])


@compiled
def _rescale_on_overflow(weight, carry, scale, streak, seed, is_nearest, grid_words, row):
    crowded = _F64(row[_OVERFLOW]) > OVERFLOW_SHARE * weight.size
    streak[0] = streak[0] + 1 if crowded else 0
    if streak[0] < OVERFLOW_STEPS:
        return
    streak[0] = 0
    scale[0] = _F32(scale[0] * _F32(2))
    row[_RESCALED] += 1
    _requantize(weight, scale[0], is_nearest, mixed(seed, 1), grid_words)
    for i in range(carry.size):
        carry[i] *= _F32(0.5)


@cache
def stepper(
    moments: int,
    geometry: int,
    placement: int,
    has_grid: bool,
    needs_scale: bool,
    needs_mean: bool,
    own_unit: bool,
    feedback: bool,
    with_carry: bool,
    decays: bool,
    counting: int,
    rescales: bool,
    divides: bool,
) -> Callable[..., Any]:
    """The compiled step of one combination of a plan's choices."""
    in_rungs = has_grid and placement == _RUNGS
    is_master = not has_grid or placement == _MASTER
    is_nearest, by_gradient = placement == _NEAREST, has_grid and geometry == _BY_GRADIENT
    by_spacing = has_grid and geometry in (_RELATIVE, _ULP)
    is_ulp, is_given, is_adam = geometry == _ULP, moments == _GIVEN, moments == _ADAM
    counts_all, counts_moves = counting == _ALL, counting > 0 and has_grid
    counts_shares = counts_all and has_grid
    # An inexact quotient may fall below the grid point that it stands for.
    on_grid = not (is_master or divides)

    def run(word, table, chosen, numbers, grid_words, call, rows):
        _wide_vectors()
        c = _constants(grid_words)
        offset, lowest, highest = grid_words[at.OFFSET], grid_words[at.LOWEST], grid_words[at.HIGHEST]
        max_index, first_normal = grid_words[at.MAX_INDEX], grid_words[at.FIRST_NORMAL]
        mantissa_step, to_fixed = _float(grid_words[at.MANTISSA_STEP]), _float(grid_words[at.TO_FIXED])
        least, max_stiffness = _F32(numbers[at.LEAST_STIFFNESS]), _F32(numbers[at.MAX_STIFFNESS])
        has_exponent, end_index = numbers[at.HAS_EXPONENT] > 0, _I32(grid_words[at.MAX_INDEX])
        lr, beta1, beta2, eps = numbers[at.LR], _F32(numbers[at.BETA1]), _F32(numbers[at.BETA2]), _F32(numbers[at.EPS])
        rest1, rest2, step_length = _F32(1 - numbers[at.BETA1]), _F32(1 - numbers[at.BETA2]), _F32(lr)
        shrink, limit = _F32(lr * numbers[at.DECAY]), _F32(lr * numbers[at.MAX_STIFFNESS])
        clip = _F32(numbers[at.RUNG_CLIP])
        whole_clip, floor, full = _F32(math.floor(numbers[at.RUNG_CLIP])), _F32(GRADIENT_FLOOR), _F32(2.0**FIXED)
        rung_decay = _F32(numbers[at.DECAY]) if own_unit else _F32(numbers[at.DECAY] * lr)
        largest_grads, looker, looked = np.zeros(chosen.size, np.uint32), 0, 0
        for position in range(chosen.size):
            line, row = table[chosen[position]], rows[chosen[position]]
            elements = line[at.ELEMENTS]
            weight = carray(pointer_to(line[at.WEIGHT]), elements, word.dtype)
            grad = carray(pointer_to(line[at.GRAD]), elements, word.dtype)
            first = carray(pointer_to(line[at.FIRST]), elements, np.float32)
            second = carray(pointer_to(line[at.SECOND]), elements, np.float32)
            direction = carray(pointer_to(line[at.DIRECTION]), elements, np.float32)
            carry = carray(pointer_to(line[at.CARRY]), elements if with_carry else 0, np.float32)
            step = carray(pointer_to(line[at.STEP]), 1, np.float32)
            streak = carray(pointer_to(line[at.STREAK]), 1, np.int64)
            scale_cell = carray(pointer_to(line[at.SCALE]), 1 if line[at.SCALE] else 0, np.float32)
            largest_cell = carray(pointer_to(line[at.LARGEST]), 1 if line[at.LARGEST] else 0, np.uint32)
            if largest_cell.size and not line[at.KNOWN]:
                largest_cell[0] = largest_bits(weight)
            while looker <= position:
                look(word, table[chosen[looker]], looked, largest_grads, looker)
                looker, looked = looker + 1, 0
            if largest_grads[position] >= _INFINITY:
                row[_SKIPPED] += 1
                continue
            step[0] += _F32(1)
            scale, mean, largest, ordinal = _F32(1), 1.0, _U32(0), _I64(step[0])
            if needs_scale:
                measures = needs_mean and (ordinal <= MEAN_EVERY or ordinal % MEAN_EVERY == 0)
                if measures or not (scale_cell.size or numbers[at.MASTER_SCALE] > 0 or numbers[at.IS_WIDE]):
                    largest = largest_cell[0] if largest_cell.size else largest_bits(weight)
                scale = scale_of(numbers, largest, scale_cell)
                if needs_mean and elements:
                    mean_cell = carray(pointer_to(line[at.MEAN]), 1, np.float64)
                    if measures:
                        mean_cell[0] = mean_of(weight, scale, largest, in_rungs, grid_words) * _F64(scale)
                    mean = mean_cell[0]
            inverse, scale_bits = _F32(1) / scale, _bits(scale)
            end_value = _F32(numbers[at.MAX_VALUE] * _F64(scale))
            seed = mixed(line[at.SEED], call)
            keys = splitmix64(seed)
            key, second_key = _U32(keys & np.uint64(0xFFFFFFFF)), _U32(keys >> np.uint64(32))
            correction = 1.0 / (1.0 - power(numbers[at.BETA1], _I64(step[0])))
            by_mean, by_root = _F32(correction), _F32(1.0 / math.sqrt(1.0 - power(numbers[at.BETA2], _I64(step[0]))))
            repaid = _F32((1 - numbers[at.BETA1]) / (numbers[at.BETA1] * lr * correction)) if feedback else _F32(0)
            length = _F32(lr * _F64(scale)) if is_ulp else _F32(lr * _F64(scale) / mean)
            bound = _F32(math.inf) if is_ulp else limit
            per_rung = _F32(lr) if own_unit else _F32(lr / mean)
            peak = _U32(0)
            begin = 0
            while begin < elements:
                end = min(begin + at.PIECE, elements)
                # The gradients of a later tensor are looked at on the way.
                while looker < chosen.size and table[chosen[looker]][at.ELEMENTS] - looked < at.LANES:
                    look(word, table[chosen[looker]], looked, largest_grads, looker)
                    looker, looked = looker + 1, 0
                is_ahead = looker < chosen.size
                if is_ahead:
                    later = table[chosen[looker]]
                    ahead = carray(pointer_to(later[at.GRAD]), later[at.ELEMENTS], word.dtype)[looked:]
                    end = min(end, begin + ahead.size // at.LANES * at.LANES)
                else:
                    ahead = grad[begin:end]
                largest_ahead = _U32(0)
                flips, applied, travel, moves = _U32(0), _U32(0), _U32(0), _U32(0)
                present, over, high, low = _U32(0), _U32(0), _U32(0), _U32(0)
                # Whole pieces, so that no index could be negative, which LLVM would have to mind.
                weights, grads, given = weight[begin:end], grad[begin:end], direction[begin:end]
                firsts, seconds, carries = first[begin:end], second[begin:end], carry[begin:end]
                for i in range(weights.size):
                    magnitude = _U32(_bits(_load(ahead[i])) & _ABSOLUTE)
                    largest_ahead = magnitude if magnitude > largest_ahead else largest_ahead
                    w, g = _load(weights[i]), _load(grads[i])
                    counter = _plus(_U32(begin), _U32(i))
                    if counts_all:
                        present = _plus(present, _U32(absolute(g) > floor))
                    if by_gradient:
                        g = _F32(g * stiffness(w, has_exponent, mantissa_step, least, max_stiffness))
                    denominator = _F32(1)
                    if is_given:
                        d = given[i]
                    elif is_adam:
                        m = _F32(_F32(firsts[i] * beta1) + _F32(g * rest1))
                        v = _F32(_F32(seconds[i] * beta2) + _F32(_F32(g * g) * rest2))
                        firsts[i], seconds[i] = m, v
                        denominator = _F32(_F32(_F32(math.sqrt(v)) * by_root) + eps)
                        d = _F32(_F32(m * by_mean) / denominator)
                    else:
                        d = _F32(_F32(firsts[i] * beta1) + g)
                        firsts[i] = d
                    y = _scaled(w, scale, inverse, divides) if needs_scale else w
                    if in_rungs:
                        index = code_on_grid(y, c, offset, max_index) if on_grid else index_of(y, c, offset, max_index)
                        rungs = _F32(d * per_rung)
                        if decays:
                            gap = gap_at(size_of(index), c[0], offset, lowest, mantissa_step, first_normal, max_index)
                            rungs = _F32(rungs + _F32(_F32(y * rung_decay) / gap))
                        rungs = clipped(rungs, clip)
                        if with_carry:
                            place = _F32(carries[i] - rungs)
                            steps = -clipped(drawn(place, counter, key, second_key), whole_clip)
                            steps = steps if rungs != _F32(0) else _F32(0)
                        else:
                            steps = drawn(rungs, counter, key, second_key)
                        wanted = _I32(minus(_U32(index), _U32(_I32(steps))))
                        inside = minimum(wanted, end_index)
                        inside = inside if inside > _I32(-end_index) else _I32(-end_index)
                        moved = minus(_U32(inside), _U32(index))
                        if with_carry:
                            below = _F32(_I32(minus(_U32(_I32(-end_index)), _U32(inside))))
                            above = _F32(_I32(minus(_U32(end_index), _U32(inside))))
                            rest = _F32(place - _F32(_I32(moved)))
                            rest = minimum(rest if rest > below else below, above)
                            carries[i] = rest if rungs != _F32(0) else carries[i]
                        value = _F32(value_of(inside, c[0], offset, c[6], first_normal) * scale)
                        weights[i] = _store(value if w == w else w, weights[i])
                        over = _plus(over, _U32(wanted != inside))
                        share, did = _F32(absolute(rungs) * full), rungs != _F32(0)
                    else:
                        if by_spacing:
                            spacing = _F32(_float(binade_of_quotient(w, scale_bits, lowest, highest)) * mantissa_step)
                            change = _F32(d * minimum(_F32(spacing * length), bound))
                        else:
                            change = _F32(d * step_length)
                        target = _F32(w - _F32(change + _F32(w * shrink)))
                        if is_master:
                            kept = _store(target, weights[i])
                            weights[i] = kept
                            target = _load(kept)
                            if needs_scale:
                                magnitude = _U32(_bits(target) & _ABSOLUTE)
                                peak = magnitude if magnitude > peak else peak
                            y_target = _scaled(target, scale, inverse, divides)
                            y_new = y_target
                        else:
                            y_target = _scaled(target, scale, inverse, divides)
                            bits = _bits(y_target)
                            magnitude = _U32(bits & _ABSOLUTE)
                            over = _plus(over, _U32((magnitude > c[9]) & (magnitude <= _INFINITY)))
                            if is_nearest:
                                rounded = _nearest(magnitude, c)
                            else:
                                rounded = _drawn(magnitude, _right(_hash(counter, key, second_key), _U32(1)), c)
                            y_new = _finished(bits, rounded, c)
                            new = _F32(y_new * scale)
                            weights[i] = _store(new, weights[i])
                            if feedback:
                                ended = minimum(target, end_value)
                                error = _F32((ended if ended > -end_value else -end_value) - new)
                                firsts[i] = _F32(m - _F32(_F32(error * denominator) * repaid))
                        if counts_moves:
                            if on_grid:
                                before = code_on_grid(y, c, offset, max_index)
                                after = code_on_grid(y_new, c, offset, max_index)
                            else:
                                before = index_of(y, c, offset, max_index)
                                after = index_of(y_new, c, offset, max_index)
                            moved, did = minus(_U32(after), _U32(before)), target != w
                        if counts_shares:
                            way = minimum(binade_of(y, lowest, highest), binade_of(y_target, lowest, highest))
                            short = _float(minus(_U32(0x7F000000), way))
                            share = _F32(_F32(absolute(_F32(y_target - y)) * short) * to_fixed)
                    if counts_moves:
                        flips = _plus(flips, _U32(moved != _U32(0)))
                        applied = _plus(applied, _U32(did))
                    if counts_shares:
                        travel, moves = _plus(travel, size_of(_I32(moved))), _plus(moves, moved)
                        part = share_word(share)
                        high, low = _plus(high, _right(part, _U32(HALF))), _plus(low, _U32(part & LOW))
                row[_FLIPS] += flips
                row[_APPLIED] += applied
                row[_GRADIENT] += present
                row[_OVERFLOW] += over
                row[_TRAVEL] += travel
                row[_POSITION] += _I64(_I32(moves))
                row[_EXPECTED] += whole_sum(high, low)
                if is_ahead:
                    largest_grads[looker] = max(largest_grads[looker], largest_ahead)
                    looked += end - begin
                begin = end
            if largest_cell.size:
                largest_cell[0] = peak
            if rescales:
                _rescale_on_overflow(weight, carry, scale_cell, streak, seed, is_nearest, grid_words, row)

    return compiled(run)
