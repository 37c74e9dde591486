"""TEST_MATRIX.md: every format, arm and layer type, and what tests each combination; from the registries.

Nothing here is typed by hand that a registry knows: numbers come from the formats, parameters from the arms,
layer types from a converted model, thresholds from the monitor and the guards, what is known from the registry of
published results. A test holds the file current and another runs exactly the combinations that are listed as
covered, so that neither can fall behind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn

from altgrad.analysis.published import PUBLISHED, Bearing, Grade, bearing_on, mark
from altgrad.quantization import (
    FORMATS,
    POLICIES,
    ConversionTable,
    RankHealthMonitor,
    named_policy,
    quantize_model,
    quantized_parameters,
)
from altgrad.training.arm_configs import ARMS
from altgrad.training.catalogue import SIGNALS
from altgrad.training.config import ModelConfig
from altgrad.training.guards import DEFAULT_GUARDS, NAMED_RULES, GuardRule
from altgrad.training.model import build_model

COVERED_BY = "tests/analysis/test_combinations.py"
TINY = ModelConfig(layers=1, heads=2, width=16, block=16)
VOCABULARY = 32
SHOWN_FORMAT = "E4M3"


@dataclass(frozen=True)
class LayerType:
    """A layer of the model: its name, its class, and the rule that leaves it out (or None).

    `weight` is the layer under whose name its weight is trained: the head, for an embedding tied to it.
    """

    name: str
    kind: str
    weight: str
    excluded: str | None

    @property
    def short(self) -> str:
        """The name without the block's number."""
        return self.name.replace("transformer.", "").replace("h.0.", "")


@dataclass(frozen=True)
class Combination:
    """One format, arm and layer type."""

    format: str
    arm: str
    layer: LayerType


@cache
def layer_types() -> tuple[LayerType, ...]:
    """The layers of a model of one block, as `quantize_model` sees them under the uniform policy."""
    model, table = _converted("uniform")
    owners = {id(weight): name for name, (weight, _) in quantized_parameters(model).items()}
    weights = {row.name: owners.get(id(model.get_parameter(f"{row.name}.weight")), row.name) for row in table}
    return tuple(
        LayerType(row.name, row.kind, weights[row.name], None if row.converted else row.reason) for row in table
    )


def _converted(policy: str) -> tuple[nn.Module, ConversionTable]:
    model = build_model(TINY, vocabulary=VOCABULARY, seed=0)
    return model, quantize_model(model, policy=named_policy(policy, SHOWN_FORMAT))


def combinations() -> list[Combination]:
    """Every combination that a test has to cover."""
    return [
        Combination(name, arm, layer)
        for layer in layer_types()
        if layer.excluded is None
        for name in FORMATS
        for arm in ARMS
    ]


def render() -> str:
    """The text of TEST_MATRIX.md."""
    covered = len(combinations())
    left_out = sum(layer.excluded is not None for layer in layer_types()) * len(FORMATS) * len(ARMS)
    parts = [
        "# Test matrix",
        "Made by `altgrad test-matrix` from the registries; a test holds it current. "
        f"{len(FORMATS)} formats × {len(ARMS)} arms × {len(layer_types())} layer types: {covered} "
        f"combinations are run by `{COVERED_BY}`, {left_out} are excluded by the rules given.",
        "## Formats",
        _formats(),
        "## Arms",
        _table(("arm", "optimizer", "parameters"), [_arm(name) for name in ARMS]),
        "## Layer types",
        _layers(),
        "## Policies",
        f"What each layer's weight takes when the format is {SHOWN_FORMAT}.",
        _policies(),
        "## Guards",
        "The defaults, then those that are to be had by name.",
        _guards(DEFAULT_GUARDS),
        _guards(NAMED_RULES.values()),
        "## Signals",
        "A guard may test each of them; `signal/min`, `/max`, `/mean` and `/sum` go over the layers.",
        _signals(),
        "## Published results",
        _known(),
        _published(),
        "## Combinations",
        "✓ is run by the test above: a gradient reaches the weight, all stays finite, "
        "and the arm's steps move the weight and leave it where the arm says it lives (resident arms: on the "
        "grid). [n] is a published result for the same case, ~[n] for a near one.",
        *(part for layer in layer_types() for part in _combination_table(layer)),
    ]
    return "\n\n".join(parts) + "\n"


def _formats() -> str:
    columns = (
        "format",
        "variant",
        "bits",
        "bias",
        "largest",
        "smallest normal",
        "smallest subnormal",
        "codes",
        "inf",
        "NaN",
    )
    return _table(
        columns,
        [
            (
                name,
                fmt.variant,
                str(fmt.total_bits),
                str(fmt.bias) if fmt.exponent_bits else "–",
                f"{fmt.max:.10g}",
                _power(fmt.min_normal),
                _power(fmt.min_subnormal),
                str(fmt.num_codes),
                _yes(fmt.has_inf),
                _yes(fmt.has_nan),
            )
            for name, fmt in FORMATS.items()
        ],
    )


def _arm(name: str) -> tuple[str, str, str]:
    values = ARMS[name].model_dump()
    kind = str(values.pop("kind"))
    return name, kind, ", ".join(f"{key} {value}" for key, value in values.items())


def _layers() -> str:
    monitor = RankHealthMonitor()
    lines = []
    for layer in layer_types():
        threshold = f"{monitor.get_threshold_for_layer(layer.weight + '.weight'):.2f}"
        state = ("yes", threshold) if layer.excluded is None else (f"excluded: {layer.excluded}", "–")
        lines.append((layer.short, layer.kind, *state))
    return _table(("layer", "class", "converted", "rank warning, drop"), lines)


def _policies() -> str:
    layers = [layer for layer in layer_types() if layer.excluded is None]
    lines = []
    for policy in POLICIES:
        rows = {row.name: row for row in _converted(policy)[1]}
        roles = [
            f"{rows[layer.name].activation} / {rows[layer.name].gradient}" for layer in layers if layer.kind == "Linear"
        ]
        weights = [str(rows[layer.name].weight) for layer in layers]
        lines.append((policy, *weights, ", ".join(dict.fromkeys(roles))))
    return _table(("policy", *(layer.short for layer in layers), "activation / gradient"), lines)


def _guards(rules: Iterable[GuardRule]) -> str:
    names = {rule: name for name, rule in NAMED_RULES.items()}
    return _table(
        ("ends a run as", "signal", "test", "limit", "checks", "after step", "name"),
        [
            (
                rule.kind,
                rule.signal,
                rule.test,
                "–" if rule.limit is None else f"{rule.limit:g}",
                str(rule.checks),
                str(rule.after_step),
                names.get(rule, "–"),
            )
            for rule in rules
        ],
    )


def _signals() -> str:
    return _table(
        ("signal", "meaning", "unit", "measured", "of layers"),
        [
            (f"`{name}`", signal.meaning.replace("|", "\\|"), signal.unit, signal.schedule, signal.row or "–")
            for name, signal in SIGNALS.items()
        ],
    )


def _known() -> str:
    grades: Counter[Grade | None] = Counter(_closest(item) for item in combinations())
    reached = {item.arm for item in combinations() if _closest(item) is not None}
    return (
        f"Of the {grades.total()} combinations {grades['same']} have a published result for the same case (same update "
        "rule, weights in the same place) and a further "
        f"{grades['near']} only for a near case (the column 'differs' says how). "
        f"For {grades[None]} no published result is known to this registry; among them is every combination of the "
        f"arms {', '.join(name for name in ARMS if name not in reached)}. "
        "Negative results are listed and begin with that word. The last column says what was read of a source: an "
        "abstract supports less than a table."
    )


def _closest(item: Combination) -> Grade | None:
    grades: tuple[Grade, ...] = ("same", "near")
    return next((grade for grade in grades if bearing_on(item.format, item.arm, item.layer.short, grade)), None)


def _published() -> str:
    columns = (
        "no.",
        "weights",
        "arms",
        "layers",
        "policy",
        "trained",
        "tensors",
        "result",
        "differs",
        "source",
        "read",
    )
    return _table(
        columns,
        [
            (
                str(number),
                ", ".join(entry.bearing.formats),
                _arms_of(entry.bearing),
                ", ".join(entry.bearing.layers),
                entry.bearing.policy or "–",
                entry.trained,
                entry.tensors,
                entry.result,
                entry.differs,
                entry.source,
                entry.read,
            )
            for number, entry in enumerate(PUBLISHED, start=1)
        ],
    )


def _arms_of(bearing: Bearing) -> str:
    return ", ".join((*bearing.arms, *(f"~{name}" for name in bearing.near)))


def _combination_table(layer: LayerType) -> tuple[str, ...]:
    title = f"### {layer.short}"
    if layer.excluded is not None:
        return title, f"Excluded, every format and arm: {layer.excluded}."
    cells = [(name, *(f"✓ {mark(name, arm, layer.short)}".rstrip() for arm in ARMS)) for name in FORMATS]
    return title, _table(("format", *ARMS), cells)


def _power(value: float | None) -> str:
    if value is None:
        return "–"
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{value:g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|" + "---|" * len(columns)
    return "\n".join([f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])
