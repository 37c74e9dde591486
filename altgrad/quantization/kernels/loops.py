"""The rounding rule as numba loops over an element's bits: uint32 for float32, uint16 for bfloat16, int16 for
float16 (the sign only tells the two halves apart).

For nearest rounding two identities shorten the rule. A normal gets half a spacing less one bit, plus its last
kept bit, added to its float32 bits, and the bits below the format's mantissa masked off; a carry into the
exponent is the next binade. That last bit is the code's parity, or its opposite with M = 0 and an even bias.
Below the normals, adding and subtracting 2^23 spacings rounds to a whole spacing with ties to even. Stochastic
rounding adds the top bits of the draw instead, and compares the 31-bit fraction below the normals.

Loops are free of branches, or LLVM does not vectorise them (4 to 6 times slower). Every integer step is cast
back to 32 bits, as numba widens to 64. `out` is None where a loop writes into its input: with two arrays at
one address LLVM's alias check falls back to scalar code.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from altgrad.quantization.kernels.compiled import compiled, inlined

_U32 = np.uint32
_U16 = np.uint16
_F32 = np.float32
_ABSOLUTE = _U32(0x7FFFFFFF)
_SIGN = _U32(0x80000000)
_INFINITY = _U32(0x7F800000)


@intrinsic
def _bits(typingctx, number):
    """The bits of a float32 as uint32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic
def _float(typingctx, bits):
    """The float32 of those bits."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def pointer_to(typingctx, address):
    """The pointer of an address."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _on_words(operation, word):
    """An LLVM operation on two words of a type as an intrinsic: numba's own widens to 64 bits, which LLVM
    cannot always undo."""

    @intrinsic
    def word_operation(typingctx, left, right):
        def generate(context, builder, signature, args):
            return getattr(builder, operation)(*args)

        return word(word, word), generate

    return word_operation


_plus, _times = _on_words("add", types.uint32), _on_words("mul", types.uint32)
_xor, _right = _on_words("xor", types.uint32), _on_words("lshr", types.uint32)
_left16, _right16 = _on_words("shl", types.uint16), _on_words("lshr", types.uint16)


def _load(word):
    """The float32 an element's word stands for; compiled code only."""
    raise NotImplementedError


def _store(number, word):
    """The element nearest to a float32, ties to even, as a word of the kind given; compiled code only."""
    raise NotImplementedError


@overload(_load)
def _load_by_type(word):
    def float32(word):
        return _float(word)

    def bfloat16(word):
        return _float(_U32(_U32(word) << _U32(16)))

    def float16(word):
        bits = _U32(np.uint16(word))
        shifted = _U32(_U32(bits & _U32(0x7FFF)) << _U32(13))
        finite = _bits(_F32(_float(shifted) * _F32(2.0**112)))
        magnitude = _U32(shifted | _INFINITY) if shifted >= _U32(0x0F800000) else finite
        return _float(_U32(magnitude | _U32(_U32(bits & _U32(0x8000)) << _U32(16))))

    return {types.uint32: float32, types.uint16: bfloat16, types.int16: float16}[word]


@overload(_store)
def _store_by_type(number, word):
    def float32(number, word):
        return _bits(number)

    def bfloat16(number, word):
        # A NaN came from a bfloat16 too: its low half is zero, so the sum cannot carry it away.
        bits = _bits(number)
        odd = _U32(_U32(bits >> _U32(16)) & _U32(1))
        rounded = _U32(_U32(bits + _U32(_U32(0x7FFF) + odd)) >> _U32(16))
        return np.uint16(rounded)

    def float16(number, word):
        bits = _bits(number)
        magnitude = _U32(bits & _ABSOLUTE)
        odd = _U32(_U32(magnitude >> _U32(13)) & _U32(1))
        normal = _U32(_U32(_U32(magnitude - _U32(0x38000000)) + _U32(_U32(0xFFF) + odd)) >> _U32(13))
        small = _U32(_bits(_F32(_float(magnitude) + _F32(0.5))) - _U32(0x3F000000))
        half = small if magnitude < _U32(0x38800000) else min(normal, _U32(0x7C00))
        half = _U32(0x7E00) if magnitude > _INFINITY else half
        return np.int16(np.uint16(_U32(half | _U32(_U32(bits >> _U32(16)) & _U32(0x8000)))))

    return {types.uint32: float32, types.uint16: bfloat16, types.int16: float16}[word]


@inlined
def _hash(counter, key, second_key):
    """32 hashed bits of a counter, as in the reference."""
    h = _xor(counter, key)
    h = _times(_xor(h, _right(h, _U32(16))), _U32(0x7FEB352D))
    h = _xor(_xor(h, _right(h, _U32(15))), second_key)
    h = _times(h, _U32(0x846CA68B))
    return _xor(h, _right(h, _U32(16)))


@inlined
def splitmix64(state):
    state = np.uint64(state + np.uint64(0x9E3779B97F4A7C15))
    state = np.uint64(np.uint64(state ^ np.uint64(state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    state = np.uint64(np.uint64(state ^ np.uint64(state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    return np.uint64(state ^ np.uint64(state >> np.uint64(31)))


@inlined
def mixed(seed, number):
    """`mix_seed(seed, number)`."""
    state = splitmix64(np.uint64(np.uint64(0x9E3779B97F4A7C15) ^ splitmix64(np.uint64(seed))))
    return splitmix64(np.uint64(state ^ splitmix64(np.uint64(number))))


@inlined
def _constants(c):
    """The words of a format, out of their array before the loop; `cpu` says what they are."""
    return c[0], c[1], c[2], c[3], c[4], _float(c[5]), _float(c[6]), _float(c[7]), _float(c[8]), c[9], c[10]


@inlined
def _nearest(magnitude, c):
    """Bits of the nearest value, before the overflow policy."""
    shift, mask, halfway, flip, min_normal, magic = c[0], c[1], c[2], c[3], c[4], c[5]
    last = _U32(_xor(_right(magnitude, shift), flip) & _U32(1))
    normal = _U32(_U32(magnitude + _U32(halfway + last)) & mask)
    small = _bits(_F32(_F32(_float(magnitude) + magic) - magic))
    return normal if magnitude >= min_normal else small


@inlined
def _drawn(magnitude, draw, c):
    """Bits of the value below, or above where the 31-bit fraction and the 31-bit draw carry."""
    shift, mask, min_normal, spacing, unscale, unscale_rest = c[0], c[1], c[4], c[6], c[7], c[8]
    normal = _U32(_U32(magnitude + _right(draw, _U32(_U32(31) - shift))) & mask)
    is_normal = magnitude >= min_normal
    steps = _F32(_F32(_float(magnitude) * unscale) * unscale_rest)
    whole = np.int32(steps)
    fraction = _U32(np.int32(_F32(_F32(steps - _F32(whole)) * _F32(2147483648.0))))
    index = np.int32(_U32(_U32(whole) + _U32(_U32(fraction + draw) >> _U32(31))))
    return normal if is_normal else _bits(_F32(_F32(index) * spacing))


@inlined
def _finished(bits, rounded, c):
    """The rounded magnitude with its sign, under the overflow and NaN policies."""
    largest, over = c[9], c[10]
    value = _U32((over if rounded > largest else rounded) | _U32(bits & _SIGN))
    return _float(bits if _U32(bits & _ABSOLUTE) > _INFINITY else value)


@inlined
def _scaled(number, scale, inverse):
    """number / scale; by its inverse where that is exact, a division being several times slower."""
    return _F32(number / scale) if inverse is None else _F32(number * _F32(inverse))


@compiled
def largest_bits(words):
    """Bits of the largest magnitude; beyond infinity's where there is a NaN."""
    largest = _U32(0)
    for i in range(words.size):
        magnitude = _U32(_bits(_load(words[i])) & _ABSOLUTE)
        largest = magnitude if magnitude > largest else largest
    return largest


@compiled
def round_nearest(x, out, scale, inverse, constants):
    c, scale = _constants(constants), _F32(scale)
    for i in range(x.size):
        bits = _bits(_scaled(_load(x[i]), scale, inverse))
        value = _finished(bits, _nearest(_U32(bits & _ABSOLUTE), c), c)
        word = _store(_F32(value * scale), x[i])
        if out is None:
            x[i] = word
        else:
            out[i] = word


@compiled
def round_nearest_in_16_bits(x, out, lowest, least, spacing, half_spacing, largest, over, parity_mask, leading_one):
    """bfloat16 without leaving its 16 bits, twice as many to a vector.

    `dropped` bits of the mantissa go: `least` of a normal's, one more for each binade below the normals, down
    to the binade that starts at one spacing; below it only zero and one spacing remain. The last bit kept
    decides ties: of the mantissa with its leading one, or of the exponent where no mantissa bit is kept.
    """
    lowest, least, spacing = np.int16(lowest), np.int16(least), _U16(spacing)
    half_spacing, largest, over = _U16(half_spacing), _U16(largest), _U16(over)
    parity_mask, leading_one = _U16(parity_mask), _U16(leading_one)
    for i in range(x.size):
        word = x[i]
        magnitude = _U16(word & _U16(0x7FFF))
        binade = np.int16(_right16(magnitude, _U16(7)))
        dropped = min(_U16(max(np.int16(lowest - binade), least)), _U16(15))
        below = _U16(~_left16(_U16(0xFFFF), dropped))
        kept = _U16(_U16(magnitude & parity_mask) | leading_one)
        odd = _U16(_right16(kept, dropped) & _U16(below & _U16(1)))
        rounded = _U16(_U16(magnitude + _U16(_right16(below, _U16(1)) + odd)) & _U16(~below))
        least_value = spacing if magnitude > half_spacing else _U16(0)
        rounded = least_value if magnitude < spacing else rounded
        signed = _U16((over if rounded > largest else rounded) | _U16(word & _U16(0x8000)))
        result = word if magnitude > _U16(0x7F80) else signed
        if out is None:
            x[i] = result
        else:
            out[i] = result


@compiled
def round_toward_zero(x, out, scale, inverse, constants):
    c, scale = _constants(constants), _F32(scale)
    for i in range(x.size):
        bits = _bits(_scaled(_load(x[i]), scale, inverse))
        magnitude = _U32(bits & _ABSOLUTE)
        below = min(_drawn(magnitude, _U32(0), c), c[9])
        value = _finished(bits, _INFINITY if magnitude == _INFINITY else below, c)
        word = _store(_F32(value * scale), x[i])
        if out is None:
            x[i] = word
        else:
            out[i] = word


@compiled
def round_stochastic(x, out, scale, inverse, constants, key, second_key, first):
    c, scale = _constants(constants), _F32(scale)
    key, second_key, counter = _U32(key), _U32(second_key), _U32(first)
    for i in range(x.size):
        draw = _right(_hash(counter, key, second_key), _U32(1))
        counter = _plus(counter, _U32(1))
        bits = _bits(_scaled(_load(x[i]), scale, inverse))
        value = _finished(bits, _drawn(_U32(bits & _ABSOLUTE), draw, c), c)
        word = _store(_F32(value * scale), x[i])
        if out is None:
            x[i] = word
        else:
            out[i] = word


@compiled
def nearest_index(x, out, scale, constants, offset, max_index):
    c, scale = _constants(constants), _F32(scale)
    shift, halfway, flip, min_normal, magic = c[0], c[2], c[3], c[4], c[5]
    offset, max_index = _U32(offset), _U32(max_index)
    for i in range(x.size):
        bits = _bits(_F32(_load(x[i]) / scale))
        magnitude = _U32(bits & _ABSOLUTE)
        last = _U32(_xor(_right(magnitude, shift), flip) & _U32(1))
        normal = _U32(_right(_U32(magnitude + _U32(halfway + last)), shift) - offset)
        small = _U32(_bits(_F32(_float(magnitude) + magic)) - _bits(magic))
        index = min(normal if magnitude >= min_normal else small, max_index)
        index = np.int32(_U32(0) if magnitude > _INFINITY else index)
        out[i] = np.int32(-index) if bits >= _SIGN else index


@compiled
def value_of_index(index, out, scale, shift, offset, spacing, max_index):
    scale, spacing, max_index = _F32(scale), _F32(spacing), np.int32(max_index)
    shift, offset = _U32(shift), _U32(offset)
    first_normal = np.int32(1 << (23 - shift))
    for i in range(index.size):
        clamped = np.int32(min(max(np.int32(index[i]), np.int32(-max_index)), max_index))
        size = np.int32(abs(clamped))
        normal = _float(_U32(_U32(_U32(size) + offset) << shift))
        value = normal if size >= first_normal else _F32(_F32(size) * spacing)
        out[i] = _F32((-value if clamped < 0 else value) * scale)


@compiled
def spacing_at(x, out, scale, lowest, highest, mantissa_step):
    scale, mantissa_step = _F32(scale), _F32(mantissa_step)
    lowest, highest = _U32(lowest), _U32(highest)
    for i in range(x.size):
        y = _F32(_load(x[i]) / scale)
        exponent = min(max(_U32(_bits(y) & _INFINITY), lowest), highest)
        out[i] = _F32(_F32(_float(exponent) * mantissa_step) * scale) if y == y else y


@compiled
def uniform(out, key, second_key, first):
    key, second_key, counter = _U32(key), _U32(second_key), _U32(first)
    for i in range(out.size):
        hashed = _hash(counter, key, second_key)
        counter = _plus(counter, _U32(1))
        out[i] = _F32(_F32(np.int32(_U32(hashed >> _U32(8)))) * _F32(2.0**-24))
