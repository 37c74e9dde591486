"""Floor 1: exact small floating-point numbers, the layers that compute with them, and what can be seen on
them.

Imports torch and pydantic; numba only when a kernel is first used, and only where it is installed.
"""

from altgrad.quantization.block_scaling import (
    BLOCK_FORMATS,
    BlockCodes,
    BlockFormat,
    block_decode,
    block_encode,
    block_quantize,
    block_scale,
    get_block_format,
)
from altgrad.quantization.conversion import (
    ConversionRow,
    ConversionTable,
    dequantize_model,
    quantize_model,
    quantized_parameters,
)
from altgrad.quantization.flip_metrics import (
    WeightFlipTracker,
    compute_flip_rate,
    compute_stall_ratio,
    count_flips,
    expected_flips,
    flip_yield,
)
from altgrad.quantization.formats import FORMATS, FloatFormat, get_format
from altgrad.quantization.layers import QuantizedEmbedding, QuantizedLinear
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
from altgrad.quantization.roles import Role
from altgrad.quantization.scaling import (
    AmaxHistory,
    ScaleRule,
    ScaleTracker,
    compute_channel_scale,
    compute_scale,
    format_scale,
    synchronize_amax,
)
from altgrad.quantization.weight_grid import WeightGrid, weight_grid

NUMERICS_VERSION = 1
"""Raised whenever the same configuration would train to other numbers; it is part of a trial's identity."""

__all__ = [
    "BLOCK_FORMATS",
    "FORMATS",
    "NUMERICS_VERSION",
    "POLICIES",
    "AmaxHistory",
    "BlockCodes",
    "BlockFormat",
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
    "Role",
    "ScaleRule",
    "ScaleTracker",
    "WeightFlipTracker",
    "WeightGrid",
    "block_decode",
    "block_encode",
    "block_quantize",
    "block_scale",
    "code_index",
    "compute_channel_scale",
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
    "get_block_format",
    "get_format",
    "hash_uniform",
    "index_to_value",
    "mix_seed",
    "named_policy",
    "quantize",
    "quantize_model",
    "quantized_parameters",
    "synchronize_amax",
    "ulp",
    "variance_rank",
    "weight_grid",
]
