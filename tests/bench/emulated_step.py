"""What an emulated step costs beside a plain one: `python tests/bench/emulated_step.py --before OTHER_TREE`.

Forward and backward of the byte GPT in plain float32, and with its layers in every kind of role, × plain; one thread,
no optimizer, no observers, every weight rounded anew in each step. With `--before`, checkouts of earlier commits are
measured in the same rounds, each in a process of its own; "kept" says what part of the first one's excess is left.

    floor      the passes that a layer cannot do without (read input and gradient, write them rounded, round
               the output in place), by copies, beside the same matrix products: what a profile would leave
    torchao    its emulated float8 training (Float8Linear, emulate=True)
    qtorch     its float_quantize on the same three operands of each layer

Below it, where the rest of the excess goes: the time inside the kernels that round operands and outputs, as parts of a
plain step, beside what the copies of the floor take, which do the same passes.

A ratio is that of the processor times of two steps, one right after the other, either first in turn; processes and
cases take turns, pair by pair. The table holds medians over the rounds. Where a model lies in memory is worth 2 % of a
step, more than the rest of the noise, so the models are built anew several times, in another order each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altgrad.quantization import LayerRule, PrecisionPolicy, Role, ScaleRule, named_policy, quantize_model
from altgrad.training import ARMS, TrainConfig
from altgrad.training.arms import build_optimizer
from altgrad.training.config import ModelConfig
from altgrad.training.model import build_model

ROOT = Path(__file__).parents[2]
SAVED = ROOT / "docs" / "bench" / "emulated_step.md"


class Shape(NamedTuple):
    """A model, its batch, and how many steps are one measurement."""

    layers: int
    width: int
    batch: int
    block: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.layers} × {self.width}, {self.batch} × {self.block}"


SHAPES = (Shape(2, 64, 8, 128, 100), Shape(4, 128, 16, 128, 24), Shape(6, 384, 8, 128, 12))


def _named(policy: str, fmt: str) -> Callable[[nn.Module], object]:
    return lambda model: quantize_model(model, policy=named_policy(policy, fmt))


def _roles(gradient: str = "E5M2", rounding: str = "nearest", **rule: object) -> Callable[[nn.Module], object]:
    """All three roles in 8 bits by one rule."""
    scale = ScaleRule.model_validate(rule)
    weight, back = (Role(format=fmt, scale=scale, rounding=rounding) for fmt in ("E4M3", gradient))
    everywhere = LayerRule(pattern="", weight=weight, activation=weight, gradient=back)
    return lambda model: quantize_model(model, policy=PrecisionPolicy(rules=(everywhere,)))


BUILDS = 6
"""How often the models of a shape are built anew."""

_ALIVE: list[object] = []
"""Optimizers that own a grid, which ends with them."""


def _on_grid(model: nn.Module) -> None:
    _named("uniform", "E4M3")(model)
    _ALIVE.append(build_optimizer(TrainConfig(format="E4M3", optimizer=ARMS["grid"].model_dump()), model))


CASES: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda model: None,
    "BF16": _named("uniform", "BF16"),
    "E4M3": _named("uniform", "E4M3"),
    "E4M3 uniform_full": _named("uniform_full", "E4M3"),
    "E7M0": _named("uniform", "E7M0"),
    "E4M3 on the grid": _on_grid,
    "delayed": _roles(kind="delayed"),
    "per channel": _roles(kind="per_channel"),
    "stochastic": _roles(rounding="stochastic"),
    "MX": _roles(kind="block"),
    "NVFP4-like": _roles(kind="block", block_scale_format="E4M3"),
}


class _Floor(torch.autograd.Function):
    """The passes over a layer's tensors, without rounding anything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, matrix = x.detach().reshape(-1, x.shape[-1]).clone(), weight.detach().clone()
        ctx.save_for_backward(rows, matrix)
        y = torch.mm(rows, matrix.t())
        return y.mul_(1.0).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, matrix = ctx.saved_tensors
        values = gradient.reshape(-1, gradient.shape[-1]).clone()
        return torch.mm(values, matrix).view(*gradient.shape[:-1], -1), torch.mm(values.t(), rows)


class _QTorch(torch.autograd.Function):
    """The rounded products as qtorch's users write them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        from qtorch.quant import float_quantize

        rows, matrix = (float_quantize(t.detach(), exp=4, man=3, rounding="nearest") for t in (x, weight))
        ctx.save_for_backward(rows, matrix)
        return float_quantize(F.linear(rows, matrix), exp=8, man=7, rounding="nearest")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from qtorch.quant import float_quantize

        rows, matrix = ctx.saved_tensors
        values = float_quantize(gradient.contiguous(), exp=5, man=2, rounding="nearest").flatten(0, -2)
        return (values @ matrix).view(rows.shape), values.t() @ rows.flatten(0, -2)


def _through(function: type[torch.autograd.Function]) -> Callable[[nn.Module], object]:
    def convert(model: nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.forward = lambda x, layer=layer: function.apply(x, layer.weight)  # type: ignore[method-assign]

    return convert


def _torchao(model: nn.Module) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))


PROFILED = ("BF16", "E4M3 uniform_full")
PROFILE_HEAD = (
    "| layers × width, batch × block | case | kernels of operands | of outputs | host and caches | excess | floor |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
)

OTHERS: dict[str, Callable[[nn.Module], object]] = {
    "floor": _through(_Floor),
    "torchao": _torchao,
    "qtorch": _through(_QTorch),
}


def rivals() -> list[str]:
    """Those of the others that are installed."""
    return [name for name in OTHERS if name == "floor" or importlib.util.find_spec(name) is not None]


class Steps:
    """Forward and backward of each case's model, of one shape."""

    def __init__(self, shape: Shape, cases: Sequence[str]) -> None:
        config = ModelConfig(layers=shape.layers, heads=max(1, shape.width // 32), width=shape.width, block=shape.block)
        draw = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randint(0, 256, (shape.batch, shape.block), generator=draw) for _ in range(2))
        self.models = {}
        _ALIVE.clear()
        for name in cases:
            self.models[name] = build_model(config, vocabulary=256, seed=0)
            (CASES | OTHERS)[name](self.models[name])
            self.step(name), self.step(name)

    def step(self, name: str) -> None:
        """One step; end_step of the layers belongs to an optimizer's."""
        model = self.models[name]
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(self.x).flatten(0, 1), self.y.flatten()).backward()

    def shares(self, name: str, rounds: int) -> tuple[float, float, float]:
        """Processor time inside the kernels of operands and of outputs, and of the whole excess, × a plain step's."""
        from altgrad.quantization.kernels import cpu_operands

        spent = dict.fromkeys(("operands", "outputs"), 0)

        def timed(kernel: Callable[..., Any], kind: str) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                start = time.process_time_ns()
                answer = kernel(*given, **named)
                spent[kind] += time.process_time_ns() - start
                return answer

            return call

        with pytest.MonkeyPatch.context() as patch:
            for owner, attribute, kind in (
                (cpu_operands, "round_to_bfloat16", "operands"),
                (cpu_operands.OperandRounder, "__call__", "operands"),
                (cpu_operands, "round_in_place", "outputs"),
            ):
                patch.setattr(owner, attribute, timed(getattr(owner, attribute), kind))
            excess = statistics.median(self.ratio(name, is_first=bool(i % 2)) for i in range(rounds)) - 1
        start = time.process_time_ns()
        for _ in range(rounds):
            self.step("plain")
        plain = time.process_time_ns() - start
        return spent["operands"] / plain, spent["outputs"] / plain, excess

    def ratio(self, name: str, *, is_first: bool) -> float:
        """A step's processor time over that of a plain step next to it."""
        seconds = {}
        for case in (name, "plain") if is_first else ("plain", name):
            start = time.process_time()
            self.step(case)
            seconds[case] = time.process_time() - start
        return seconds[name] / seconds["plain"]


def serve() -> None:
    """Answers a shape with nothing, a case with its ratio and a profile with its shares, a line of JSON each."""
    torch.set_num_threads(1)
    steps: Steps | None = None
    answer: Any
    for line in sys.stdin:
        asked = json.loads(line)
        if "shape" in asked:
            steps = None  # its memory is free before the next one's is asked for
            steps = Steps(Shape(*asked["shape"]), asked["cases"])
            answer = None
        elif "profile" in asked:
            assert steps is not None
            answer = steps.shares(asked["profile"], asked["rounds"])
        else:
            assert steps is not None
            answer = steps.ratio(asked["case"], is_first=asked["is_first"])
        print(json.dumps(answer), flush=True)


class Side:
    """A process that measures one tree."""

    def __init__(self, tree: Path) -> None:
        path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        words = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
        )

    def ask(self, **question: object) -> Any:
        """The answer to a line of `serve`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that measures ended with exit code {self.process.wait()}")
        return json.loads(answer)


def measured(
    shapes: Sequence[Shape], trees: dict[str, Path], cases: Sequence[str], others: Sequence[str]
) -> tuple[dict[Shape, dict[tuple[str, str], float]], list[str]]:
    """By shape, then tree and case: the median over the rounds of its step over the same tree's plain one; and lines
    of the table of profiles."""
    sides = {name: Side(tree) for name, tree in trees.items()}
    found, profiles = {}, []
    for shape in shapes:
        asked = {name: [*cases, *(others if name == "now" else ())] for name in sides}
        turns = [(name, case) for name in sides for case in asked[name]]
        turns.sort(key=lambda turn: turn[1])
        ratios: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
        for number in range(shape.rounds):
            if number * BUILDS // shape.rounds != (number - 1) * BUILDS // shape.rounds:
                draw = random.Random(number)
                for name, side in sides.items():
                    built = ["plain", *asked[name]]
                    side.ask(shape=shape, cases=draw.sample(built, len(built)))
            for name, case in turns:
                ratios[name, case].append(sides[name].ask(case=case, is_first=bool(number % 2)))
        found[shape] = {turn: statistics.median(values) for turn, values in ratios.items()}
        print(as_lines(shape, found[shape]), flush=True)
        for case in [case for case in PROFILED if case in cases]:
            operands, outputs, excess = sides["now"].ask(profile=case, rounds=shape.rounds)
            copies = found[shape].get(("now", "floor"), float("nan")) - 1
            cells = (operands, outputs, excess - operands - outputs, excess, copies)
            profiles.append(" | ".join([f"| {shape}", case, *(f"{cell:.3f}" for cell in cells)]) + " |")
            print(profiles[-1], flush=True)
    for side in sides.values():
        side.process.stdin.close()  # type: ignore[union-attr]
        side.process.wait()
    return found, profiles


def as_lines(shape: Shape, ratios: dict[tuple[str, str], float]) -> str:
    """The rows of the table of one shape."""
    earlier = list(dict.fromkeys(side for side, _ in ratios if side != "now"))
    lines = []
    for case in [*CASES, *OTHERS]:
        if ("now", case) not in ratios:
            continue
        now, before = ratios["now", case], [ratios.get((side, case)) for side in earlier]
        cells = ["–" if value is None else f"{value:.3f}" for value in before]
        kept = f"{(now - 1) / (before[0] - 1):.2f}" if before and before[0] is not None else "–"
        lines.append(" | ".join([f"| {shape}", case, *cells, f"{now:.3f}", f"{kept} |"]))
    return "\n".join(lines)


def _commit(tree: Path) -> str:
    words = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measures, prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, nargs="*", default=(), help="checkouts of earlier commits, oldest first")
    parser.add_argument("--cases", nargs="+", default=[name for name in CASES if name != "plain"], choices=CASES)
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)), help="by number, from 0")
    parser.add_argument("--save", type=Path, help="markdown file to write")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    trees = {_commit(tree): tree.resolve() for tree in asked.before} | {"now": ROOT}
    found, profiles = measured([SHAPES[i] for i in asked.shapes], trees, asked.cases, rivals())
    names = ["layers × width, batch × block", "case", *trees, "kept"]
    head = f"| {' | '.join(names)} |\n| --- | --- |{' ---: |' * (len(names) - 2)}"
    text = "\n".join([f"now: {_commit(ROOT)}\n", head, *(as_lines(shape, ratios) for shape, ratios in found.items())])
    text += f"\n\n{PROFILE_HEAD}\n" + "\n".join(profiles)
    print(text)
    if asked.save:
        asked.save.write_text(text + "\n")


@pytest.mark.bench
def test_the_benchmark_runs() -> None:
    tiny = Shape(1, 32, 2, 16, 3)
    found, profiles = measured([tiny], {"earlier": ROOT, "now": ROOT}, ["BF16", "delayed"], ["floor"])
    assert len(found[tiny]) == 5 and len(profiles) == 1
    assert all(value > 0 for value in found[tiny].values())


if __name__ == "__main__":
    main()
