"""Floor 1: exact small floating-point numbers, the layers that compute with them, and what can be seen on
them.

Imports torch and pydantic; numba only when a kernel is first used, and only where it is installed.
"""

from altgrad.quantization.block_scaling import (
    BLOCK_FORMATS,
    BlockFormat,
    block_decode,
    block_encode,
    block_quantize,
    block_scale,
    get_block_format,
)
from altgrad.quantization.conversion import (
    check_policy,
    dequantize_model,
    embedded_weights,
    multiplied_parameters,
    quantize_model,
    quantized_parameters,
    requantize_layer,
    rounded_weights,
)
from altgrad.quantization.conversion_table import ConversionTable
from altgrad.quantization.diagnostics import (
    BitStallDetector,
    codes_in_use,
    compute_stiffness_field,
    detect_bit_stall,
    gradient_stiffness_correlation,
    grid_alignment_statistics,
    stiffness_pearson,
    ulp_statistics,
)
from altgrad.quantization.export import ExportedModel, export_model, load_exported
from altgrad.quantization.flip_metrics import WeightFlipTracker, compute_flip_rate, compute_stall_ratio, flip_yield
from altgrad.quantization.formats import FORMATS, FloatFormat, get_format
from altgrad.quantization.layer_kinds import register_layer
from altgrad.quantization.layers import QuantizedLinear
from altgrad.quantization.ops import decode, encode, hash_uniform, mix_seed, quantize, ulp
from altgrad.quantization.policy import (
    POLICIES,
    LayerRule,
    PrecisionPolicy,
    named_policy,
    names_its_own_formats,
    own_format,
    same_spacings,
)
from altgrad.quantization.rank_health import RankHealthMonitor, RankTrendDetector, ReferenceRatioDetector
from altgrad.quantization.ranks import compute_effective_rank, compute_stable_rank
from altgrad.quantization.recipes import Recipe, RoleChange
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
from altgrad.quantization.spectral_norm import RankGauge, SpectralNormTracker
from altgrad.quantization.stability import EmergencyMantissaShift, FormatShift, PartitionRelativeClipper
from altgrad.quantization.tensor_stats import (
    AmaxMovingAverage,
    DeadUnits,
    activation_kurtosis,
    count_nonfinite,
    gradient_statistics,
    overflow_share,
    range_statistics,
    update_statistics,
)
from altgrad.quantization.weight_grid import weight_grid
from altgrad.quantization.weight_roles import WeightRoles
from altgrad.quantization.wrapped_layers import QuantizedLayer

__all__ = [
    "BLOCK_FORMATS",
    "FORMATS",
    "POLICIES",
    "AmaxHistory",
    "AmaxMovingAverage",
    "BitStallDetector",
    "BlockFormat",
    "ConversionTable",
    "DeadUnits",
    "EmergencyMantissaShift",
    "ExportedModel",
    "FloatFormat",
    "FormatShift",
    "LayerRule",
    "PartitionRelativeClipper",
    "PrecisionPolicy",
    "QuantizedLayer",
    "QuantizedLinear",
    "RankGauge",
    "RankHealthMonitor",
    "RankTrendDetector",
    "Recipe",
    "ReferenceRatioDetector",
    "Role",
    "RoleChange",
    "ScaleRule",
    "ScaleTracker",
    "SpectralNormTracker",
    "WeightFlipTracker",
    "WeightRoles",
    "activation_kurtosis",
    "block_decode",
    "block_encode",
    "block_quantize",
    "block_scale",
    "check_policy",
    "codes_in_use",
    "compute_channel_scale",
    "compute_effective_rank",
    "compute_flip_rate",
    "compute_scale",
    "compute_stable_rank",
    "compute_stall_ratio",
    "compute_stiffness_field",
    "count_nonfinite",
    "decode",
    "dequantize_model",
    "detect_bit_stall",
    "embedded_weights",
    "encode",
    "export_model",
    "flip_yield",
    "format_scale",
    "get_block_format",
    "get_format",
    "gradient_statistics",
    "gradient_stiffness_correlation",
    "grid_alignment_statistics",
    "hash_uniform",
    "load_exported",
    "mix_seed",
    "multiplied_parameters",
    "named_policy",
    "names_its_own_formats",
    "overflow_share",
    "own_format",
    "quantize",
    "quantize_model",
    "quantized_parameters",
    "range_statistics",
    "register_layer",
    "requantize_layer",
    "rounded_weights",
    "same_spacings",
    "stiffness_pearson",
    "synchronize_amax",
    "ulp",
    "ulp_statistics",
    "update_statistics",
    "weight_grid",
]
