"""Any arm for any model, in a training loop of one's own.

    optimizer = build_arm(model, "manifold", format="E4M3", lr=2e-3)
    for batch in batches:
        model(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log(weight_signals(model, optimizer))

The optimizer is one of torch's: schedulers, gradient scaling, clipping, checkpoints and hosts such as the Trainer of
transformers or accelerate take it as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from altgrad.quantization import (
    FloatFormat,
    PrecisionPolicy,
    compute_effective_rank,
    compute_flip_rate,
    compute_stable_rank,
    compute_stall_ratio,
    dequantize_model,
    flip_yield,
    multiplied_parameters,
    quantize_model,
    quantized_parameters,
    rounded_weights,
)
from altgrad.quantization.formats import unknown_message
from altgrad.training.arm_configs import ARMS, AnyOptimizerConfig
from altgrad.training.arms import arm_optimizer, weight_formats
from altgrad.training.optimizer import GridAwareOptimizer


def build_arm(
    model: nn.Module,
    arm: str,
    format: str | FloatFormat | None = None,
    policy: PrecisionPolicy | str | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> GridAwareOptimizer:
    """Any arm by name over any model: converts it in place, unless it is converted, and builds the arm's optimizer.

    `format` and `policy` as in `quantize_model`, and none for a model that is converted already; `options`: fields of
    the arm's configuration (`lr`, `rung_clip`, ...). What the steps did is in `weight_signals(model, optimizer)`.

    ValueError: an unknown arm or option, a format missing, or given for a converted model.
    """
    if arm not in ARMS:
        raise ValueError(unknown_message("arm", arm, tuple(ARMS)))
    config = _with_options(ARMS[arm], options)
    is_converted = bool(rounded_weights(model))
    if is_converted and (format is not None or policy is not None):
        raise ValueError(
            f"this model is converted already; format={format!r}, policy={policy!r} have no meaning for it"
        )
    if not is_converted:
        quantize_model(model, format, policy, seed=seed)
    formats = weight_formats(model)
    if not config.rounds_operands:
        dequantize_model(model)
    return arm_optimizer(config, model, formats, seed)


def _with_options(config: AnyOptimizerConfig, options: Mapping[str, Any]) -> AnyOptimizerConfig:
    try:
        return type(config).model_validate(config.model_dump() | dict(options))
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else ", ".join(options)
        if name not in type(config).model_fields:
            raise ValueError(
                unknown_message(f"option of {config.arm}", name, tuple(type(config).model_fields))
            ) from None
        raise ValueError(f"{name}={options.get(name)!r}: {problem['msg']}") from None


def weight_signals(model: nn.Module, optimizer: GridAwareOptimizer) -> dict[str, dict[str, float]]:
    """Layer to signal to value, of the optimizer's last counted step and of the weights as they are, for a log.

    `flips`, `flip_rate`, `flip_yield`, `stall_ratio`: of that step; `stable_rank`, `effective_rank`: of each weight.
    Waits for the device; every `count_every`-th step is counted.
    """
    counts = optimizer.counts
    found: dict[str, dict[str, float]] = {}
    for name, parameter in _watched(model).items():
        signals = found[name] = {
            "stable_rank": float(compute_stable_rank(parameter)),
            "effective_rank": float(compute_effective_rank(parameter)),
        }
        if parameter in counts:
            step = counts[parameter]
            flips = int(step.flips)
            signals |= {
                "flips": flips,
                "flip_rate": compute_flip_rate(flips, parameter.numel()),
                "flip_yield": flip_yield(flips, float(step.expected)),
                "stall_ratio": compute_stall_ratio(flips, int(step.applied)),
            }
    return found


def _watched(model: nn.Module) -> dict[str, nn.Parameter]:
    converted = {name: parameter for name, (parameter, _) in quantized_parameters(model).items()}
    return converted or multiplied_parameters(model)
