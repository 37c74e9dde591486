"""The tensors that a layer multiplies, in their roles, seen by hooks that change nothing.

At a check every role's amax, its moving average, and the share beyond the format's range; on the rarer schedule, what
else the format makes of the tensor (underflow, saturation, SQNR), the kurtosis of what comes in, and the largest
attention logit. Of a step whose loss is not finite one sum over each module's output: where it is not finite, so is the
output, and the first such module in the order of execution is where a run broke.

Activations are looked at before the layer rounds them, under the scale that it will take; gradients as they arrive at
the layer's output. A layer in block scales has no single scale, and only its amax is followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from altgrad.quantization import (
    AmaxMovingAverage,
    QuantizedLinear,
    WeightRoles,
    activation_kurtosis,
    overflow_share,
    range_statistics,
    rounded_weights,
)
from altgrad.quantization.kernels.dispatch import scalar
from altgrad.quantization.roles import RoleQuantizer
from altgrad.quantization.scaling import amax
from altgrad.quantization.wrapped_layers import LayerWeight
from altgrad.training.model import Attention
from altgrad.training.observers.base import Moment, Observer, Readings, Subject


class TensorObserver(Observer):
    """Ranges by role; see the module."""

    def __init__(self, subject: Subject) -> None:
        self._weights = rounded_weights(subject.model)
        self._average = AmaxMovingAverage()
        self._found: Readings = {}
        self._largest: dict[tuple[str, str], Tensor] = {}
        self._moment = Moment(0, check=False, detail=False)
        self._open = False
        self._hooks: list[RemovableHandle] = []
        for name, roles in self._weights.items():
            if isinstance(roles, QuantizedLinear):
                self._hooks += [
                    roles.register_forward_pre_hook(partial(self._came_in, name)),
                    roles.register_forward_hook(partial(self._went_out, name)),
                ]
            elif isinstance(roles, LayerWeight):
                roles.watch = partial(self._met, name, roles)
        for owner, module in subject.model.named_modules():
            if isinstance(module, Attention):
                self._hooks.append(module.c_attn.register_forward_hook(partial(self._attended, owner, module)))

    def start_step(self, moment: Moment) -> None:
        self._moment, self._open = moment, moment.check

    def before_update(self) -> None:
        if self._moment.check:
            for name, roles in self._weights.items():
                self._look(name, "weight", roles.tensor().detach(), roles.weight_quantizer, own_scale=roles.grid.scale)
        self._open = False

    def collect(self) -> Readings:
        named = {f"{name}/{role}": largest for (name, role), largest in self._largest.items()}
        averages = self._average.update_all(self._moment.step, named)
        for (name, role), average in zip(self._largest, averages.values(), strict=True):
            self._found[name, f"{role}_amax_mean"] = average.mean
            self._found[name, f"{role}_amax_jump"] = average.jump
        found, self._found, self._largest = self._found, {}, {}
        return found

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._average.load_state_dict(state)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for roles in self._weights.values():
            if isinstance(roles, LayerWeight):
                roles.watch = None

    def _came_in(self, name: str, layer: QuantizedLinear, inputs: tuple[Tensor, ...]) -> None:
        self._met(name, layer, "activation", inputs[0].detach())

    def _went_out(self, name: str, layer: QuantizedLinear, _: Any, y: Tensor) -> None:
        if self._open and y.requires_grad:
            y.register_hook(lambda gradient: self._met(name, layer, "gradient", gradient.detach()))

    @torch.no_grad()
    def _met(self, name: str, roles: WeightRoles, role: str, x: Tensor) -> None:
        if self._open and x.numel():
            quantizer = roles.activation_quantizer if role == "activation" else roles.gradient_quantizer
            self._look(name, role, x, quantizer)
            if role == "activation" and self._moment.detail:
                self._found[name, "activation_kurtosis"] = activation_kurtosis(x)

    def _attended(self, name: str, attention: Attention, _: nn.Module, inputs: Any, parts: Tensor) -> None:
        if self._open and self._moment.detail:
            query, key, _value = attention.split(parts.detach())
            logits = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            self._found[name, "attention_logit_max"] = logits.amax()

    def _look(
        self, name: str, role: str, x: Tensor, quantizer: RoleQuantizer | None, own_scale: Tensor | None = None
    ) -> None:
        if (name, f"{role}_amax") in self._found:
            return  # a layer that runs twice in a step is seen at its first run
        largest = amax(x)
        self._found[name, f"{role}_amax"] = self._largest[name, role] = largest
        if quantizer is None or quantizer.role.scale.kind == "block":
            return
        scale, rule = own_scale, quantizer.role.scale
        if scale is None:
            scale = rule.scale(x, quantizer.fmt, quantizer.tracker, update=False, largest=largest)
        if not self._moment.detail:
            self._found[name, f"{role}_overflow"] = overflow_share(x, quantizer.fmt, scale, largest)
            return
        covered = range_statistics(x, quantizer.fmt, scale, largest)
        self._found |= {
            (name, f"{role}_overflow"): covered.overflow,
            (name, f"{role}_underflow"): covered.underflow,
            (name, f"{role}_saturation"): covered.saturation,
            (name, f"{role}_sqnr"): covered.sqnr_db,
        }


class OutputSums:
    """One sum per module and step, to find the first output that was not finite; modules in the order of execution.

    Only a step whose loss is not finite asks for them. On a CPU, where the loss can be read without waiting, outputs
    are kept to the end of the forward pass and summed only then; elsewhere at every step, as they come. Outputs that
    were written to in place since are left out, and so is what runs outside a forward pass, such as a recomputation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        self._waiting: list[tuple[str, Tensor, int]] = []
        self._sums: dict[str, Tensor] = {}
        self._open = False
        self._fixed = False
        self._hooks = [
            module.register_forward_hook(partial(self._take, name))
            for name, module in model.named_modules()
            if not list(module.children())
        ]

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._waiting = []

    def start_step(self) -> None:
        """Before the first forward pass of a training step."""
        self._sums, self._waiting = {}, []

    def start_forward(self) -> None:
        """Before each forward pass of the step."""
        self._open = True

    def end_forward(self, loss: Tensor) -> None:
        """After it and before its backward pass, with its loss (0-d)."""
        waiting, self._waiting = self._waiting, []
        self._open, self._fixed = False, True
        known = scalar(loss.detach())
        if known is None or not math.isfinite(known):
            for name, y, version in waiting:
                if y._version == version:
                    self._add(name, y)

    def end_step(self, device: torch.device) -> Tensor:
        """[modules] sums of the step, 0 where nobody asked, in the order of `names`, which the first step fixes."""
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return torch.stack([self._sums.get(name, zero) for name in self.names]) if self.names else zero[None][:0]

    def _take(self, name: str, _: nn.Module, inputs: Any, y: Any) -> None:
        if not self._open or not isinstance(y, Tensor) or not y.is_floating_point():
            return
        if not self._fixed and name not in self.names:
            self.names.append(name)
        if y.device.type == "cpu":
            self._waiting.append((name, y.detach(), y._version))
        else:
            self._add(name, y.detach())

    def _add(self, name: str, y: Tensor) -> None:
        total = y.sum(dtype=torch.float32)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
