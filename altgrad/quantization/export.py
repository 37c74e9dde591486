"""Taking a converted model's weights elsewhere: as plain numbers, or as codes with their scales.

What is exported are the numbers that the layers multiply by, not the float32 masters behind them. As `values` they are
plain tensors that any copy of the unconverted model loads. As `codes` each weight is stored in its format: one of
torch's float8 types where the format is one, else bit patterns (`encode`), beside a float32 scale. The recipe, every
weight's roles by name, goes with them; `load_exported` converts a plain model by it, which then computes the same
outputs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from altgrad.quantization.block_scaling import BlockFormat
from altgrad.quantization.conversion import quantize_model, role_state, rounded_weights
from altgrad.quantization.conversion_table import ConversionTable
from altgrad.quantization.formats import get_format, unknown_message
from altgrad.quantization.ops import decode, encode
from altgrad.quantization.policy import LayerRule, PrecisionPolicy
from altgrad.quantization.roles import ROLES, RoleQuantizer
from altgrad.quantization.weight_roles import WeightRoles

Stored = Literal["values", "codes"]

SCALE = "_scale"
"""Added to a weight's name for the scale of its codes."""

NATIVE = {
    get_format(dtype): dtype
    for dtype in (
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.float16, torch.bfloat16),
    )
}
"""Formats that are types of torch."""

RECIPE = "altgrad_recipe"
"""Key of the recipe in the metadata of a safetensors file."""

STATE = "altgrad_state."
"""Before the names of what roles keep from step to step, in a safetensors file."""


@dataclass(frozen=True)
class ExportedModel:
    """`tensors`: a plain model's state, by name; `recipe`: name of a weight to its roles, as plain data; `state`: what
    the roles keep from step to step, such as amax histories."""

    tensors: dict[str, Tensor]
    recipe: dict[str, dict[str, Any]]
    state: dict[str, Tensor]


def export_model(model: nn.Module, path: str | Path | None = None, *, store: Stored = "values") -> ExportedModel:
    """The state of a converted model with its weights as they are multiplied; written to `path` as safetensors.

    `store`: "values", float32; "codes", a tensor of codes and `NAME_scale` for each weight (torch.float8_e4m3fn and
    the like where torch has the type). Tied weights are stored once under each of their names.

    ValueError: a model that is not converted, a weight that is made from others (pruning, norms), an unknown `store`.
    FileNotFoundError: no such folder.
    """
    weights = rounded_weights(model)
    if store not in get_args(Stored):
        raise ValueError(unknown_message("store", store, get_args(Stored)))
    if not weights:
        raise ValueError("this model is not converted (quantize_model); its own state_dict() is all there is to export")
    state = role_state(model)
    tensors = {name: value.detach().cpu().clone() for name, value in model.state_dict().items() if name not in state}
    recipe, plain, written = {}, set(tensors), dict[str, Tensor]()
    for name, roles in weights.items():
        aliases = _aliases(model, roles.parameter())
        if not aliases:
            raise ValueError(f"the weight of {name} is made from other tensors; remove its pruning or norm first")
        values = roles.quantized_weight().detach().cpu()
        if aliases[0] in written and not torch.equal(written[aliases[0]], values):
            raise ValueError(
                f"{name} shares its weight with a layer that rounds it otherwise; an export holds one of them"
            )
        written |= dict.fromkeys(aliases, values)
        tensors |= dict.fromkeys(aliases, values)
        if store == "codes":
            codes, scale = _encoded(roles)
            if taken := [f"{alias}{SCALE}" for alias in aliases if f"{alias}{SCALE}" in plain]:
                raise ValueError(
                    f"the model has a {taken[0]} of its own, where the scale of codes belongs; store values"
                )
            tensors |= dict.fromkeys(aliases, codes) | {f"{alias}{SCALE}": scale for alias in aliases}
        recipe[name] = {"parameters": aliases, "store": store} | {
            role: {"role": quantizer.role.model_dump(mode="json"), "key": quantizer.key}
            for role, quantizer in roles.quantizers().items()
        }
    exported = ExportedModel(tensors, recipe, {name: value.cpu() for name, value in state.items()})
    if path is not None:
        _save(exported, Path(path))
    return exported


def load_exported(model: nn.Module, source: ExportedModel | str | Path) -> ConversionTable:
    """Converts an unconverted model by an export's recipe, in place, and gives it the exported weights.

    They are multiplied as they are, and rounded again only once somebody has written to them.

    ValueError: a file that is no export; a recipe whose layers the model lacks; tensors that do not fit (as
    `load_state_dict` says it).
    """
    exported = source if isinstance(source, ExportedModel) else _load(Path(source))
    policy = PrecisionPolicy(
        rules=tuple(_rule(name, own) for name, own in exported.recipe.items()),
        embeddings=any(isinstance(m, nn.Embedding) and n in exported.recipe for n, m in model.named_modules()),
    )
    table = quantize_model(model, policy=policy)
    coded = (own["parameters"] for own in exported.recipe.values() if own["store"] == "codes")
    scales = {f"{name}{SCALE}" for names in coded for name in names}
    tensors = {name: value for name, value in exported.tensors.items() if name not in scales} | exported.state
    weights = rounded_weights(model)
    for name, own in exported.recipe.items():
        roles = weights[name]
        for role, quantizer in roles.quantizers().items():
            setattr(roles, f"{role}_quantizer", RoleQuantizer(quantizer.role, own[role]["key"]))
        if own["store"] == "codes":
            codes, scale = (exported.tensors[own["parameters"][0] + more] for more in ("", SCALE))
            tensors |= dict.fromkeys(_aliases(model, roles.parameter()), _decoded(roles, codes, scale))
    model.load_state_dict(tensors)
    for name in exported.recipe:
        weights[name].settle()
    return table


def _rule(name: str, own: dict[str, Any]) -> LayerRule:
    roles = {role: own[role]["role"] if role in own else None for role in ROLES}
    return LayerRule.model_validate({"pattern": f"^{re.escape(name)}$"} | roles)


def _encoded(roles: WeightRoles) -> tuple[Tensor, Tensor]:
    """Codes of the weight's shape, and their scale: 0-d, one for each output, or [outputs, blocks]."""
    operand, fmt, rule = roles.weight_operand(), roles.weight_format, roles.weight_quantizer.role.scale
    values = operand.numbers.cpu()
    scale = torch.ones((), dtype=torch.float32) if operand.scale is None else operand.scale.detach().cpu()
    exact = NATIVE.get(fmt)
    codes = encode(values, fmt, scale) if exact is None else (values / scale).to(exact)
    if scale.dim() and rule.kind == "block":
        scale = roles.as_rows(scale)[:, :: _block_size(roles)].contiguous()
    return codes, scale


def _decoded(roles: WeightRoles, codes: Tensor, scale: Tensor) -> Tensor:
    rule = roles.weight_quantizer.role.scale
    if scale.dim() and rule.kind == "block":
        summed = roles.as_rows(codes.to(torch.float32)).shape[1]
        scale = roles.from_rows(scale.repeat_interleave(_block_size(roles), 1)[:, :summed])
    if codes.is_floating_point():
        return codes.to(torch.float32) * scale
    return decode(codes, roles.weight_format, scale)


def _block_size(roles: WeightRoles) -> int:
    rule = roles.weight_quantizer.role.scale
    return BlockFormat(roles.weight_format, rule.block_scale_format, rule.block_size).size


def _aliases(model: nn.Module, parameter: Any) -> list[str]:
    """Every name that a parameter has."""
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]


def _save(exported: ExportedModel, path: Path) -> None:
    from safetensors.torch import save_file

    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    state = {f"{STATE}{name}": value for name, value in exported.state.items()}
    # A file of safetensors holds no two names of one memory.
    tensors = {name: value.contiguous().clone() for name, value in (exported.tensors | state).items()}
    save_file(tensors, path, metadata={RECIPE: json.dumps(exported.recipe)})


def _load(path: Path) -> ExportedModel:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        recipe = (file.metadata() or {}).get(RECIPE)
        found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if recipe is None:
        raise ValueError(f"{path} holds no recipe: it was not written by export_model")
    state = {name.removeprefix(STATE): value for name, value in found.items() if name.startswith(STATE)}
    tensors = {name: value for name, value in found.items() if not name.startswith(STATE)}
    return ExportedModel(tensors, json.loads(recipe), state)
