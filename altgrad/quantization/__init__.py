"""Floor 1: exact small floating-point numbers, the layers that compute with them, and what can be seen on
them.

Imports torch and pydantic; numba only when a kernel is first used, and only where it is installed.
"""

from altgrad.quantization.flip_metrics import (
    WeightFlipTracker,
    compute_flip_rate,
    compute_stall_ratio,
    count_flips,
    expected_flips,
    flip_yield,
)
from altgrad.quantization.formats import FORMATS, FloatFormat, get_format
from altgrad.quantization.layers import (
    ConversionRow,
    ConversionTable,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_model,
    quantize_model,
    quantized_parameters,
)
from altgrad.quantization.ops import (
    code_index,
    decode,
    encode,
    hash_uniform,
    index_to_value,
    mix_seed,
    quantize,
    ulp,
)
from altgrad.quantization.policy import POLICIES, LayerRule, PrecisionPolicy, named_policy
from altgrad.quantization.rank_health import (
    RankHealthMonitor,
    RankTrendDetector,
    RankWarning,
    ReferenceRatioDetector,
    compute_effective_rank,
    compute_stable_rank,
    variance_rank,
)
from altgrad.quantization.scaling import AmaxHistory, ScaleTracker, compute_scale, format_scale

NUMERICS_VERSION = 1
"""Raised whenever the same configuration would train to other numbers; it is part of a trial's identity."""

__all__ = [
    "FORMATS",
    "NUMERICS_VERSION",
    "POLICIES",
    "AmaxHistory",
    "ConversionRow",
    "ConversionTable",
    "FloatFormat",
    "LayerRule",
    "PrecisionPolicy",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RankHealthMonitor",
    "RankTrendDetector",
    "RankWarning",
    "ReferenceRatioDetector",
    "ScaleTracker",
    "WeightFlipTracker",
    "code_index",
    "compute_effective_rank",
    "compute_flip_rate",
    "compute_scale",
    "compute_stable_rank",
    "compute_stall_ratio",
    "count_flips",
    "decode",
    "dequantize_model",
    "encode",
    "expected_flips",
    "flip_yield",
    "format_scale",
    "get_format",
    "hash_uniform",
    "index_to_value",
    "mix_seed",
    "named_policy",
    "quantize",
    "quantize_model",
    "quantized_parameters",
    "ulp",
    "variance_rank",
]
