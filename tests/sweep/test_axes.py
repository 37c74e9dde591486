"""Axes over any field multiply exactly the trials that have it; constraints leave out what they name, and count it."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from altgrad.cli import main
from altgrad.sweep.space.resolve import resolve
from altgrad.sweep.space.schema import json_schema
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import MODELS

CONFIGS = sorted((Path(__file__).parents[2] / "sweeps" / "configs").glob("*.yaml"))
EXPERIMENTS = [
    "bf16_baseline",
    "e0m7_uniform",
    "e1m6_uniform",
    "e3m4_uniform",
    "e5m2_fp8",
    "e5m2_manifold",
    "e5m2_standard",
    "e7m0_uniform",
]


def spec(**changes: object) -> SweepSpec:
    return SweepSpec.model_validate({"formats": "E5M2", "optimizers": "grid", "seeds": 1} | changes)


def cells(found: SweepSpec) -> list:
    return [trial for trial in found.expand() if not trial.is_reference]


def test_a_field_multiplies_only_the_arms_that_have_it() -> None:
    found = spec(
        optimizers="adamw,manifold,grid",
        seeds=3,
        axes={
            "optimizer.beta2": [0.9, 0.95],
            "optimizer.precondition": ["update", "gradient"],
            "optimizer.rung_clip": [1, 3, 10],
        },
    )
    counts = Counter(trial.optimizer.kind for trial in cells(found))
    assert counts == {"adamw": 3 * 2, "manifold": 3 * 2 * 2, "grid": 3 * 2 * 3}
    assert len(found.expand()) == sum(counts.values()) + 3 * 2, "and a reference for each value that AdamW has"
    assert {trial.arm for trial in cells(found)} == {"adamw", "manifold", "manifold_gradient", "grid"}


def test_a_value_that_one_arm_does_not_know_multiplies_the_others() -> None:
    found = spec(optimizers="manifold,grid", axes={"optimizer.step_unit": ["weight", "ulp"]})
    units = [(trial.optimizer.kind, trial.optimizer.step_unit) for trial in cells(found)]
    assert units == [("manifold", "weight"), ("manifold", "ulp"), ("grid", "weight")]


def test_an_arm_may_have_an_axis_of_its_own_in_place_of_the_common_one() -> None:
    found = spec(optimizers="grid,lion", lrs="1e-3,2e-3", axes={"lion.lr": [1e-4], "grid.momentum": [0.5, 0.9]})
    values = [(trial.arm, trial.optimizer.lr, trial.optimizer.momentum) for trial in cells(found)]
    assert values == [
        ("grid", 1e-3, 0.5),
        ("grid", 1e-3, 0.9),
        ("grid", 2e-3, 0.5),
        ("grid", 2e-3, 0.9),
        ("lion", 1e-4, 0.9),
    ]


def test_a_field_that_is_read_under_one_kind_multiplies_only_that_kind() -> None:
    found = spec(axes={"schedule.kind": ["constant", "wsd"], "schedule.decay_fraction": [0.1, 0.2]})
    kinds = [(trial.schedule.kind, trial.schedule.decay_fraction) for trial in cells(found)]
    assert kinds == [("constant", 0.2), ("wsd", 0.1), ("wsd", 0.2)]


def test_every_setting_has_its_own_reference() -> None:
    found = spec(
        axes={
            "data.batch": [2, 4],
            "model": ["quick", {"layers": 1}],
            "interventions": [[], [{"kind": "partition_clip"}]],
            "clip_grad_norm": [1, None],
        }
    )
    trials = found.expand()
    settings = {(t.data.batch, t.model, t.interventions, t.clip_grad_norm) for t in trials}
    assert len(settings) == 16 and len(trials) == 32
    assert sum(trial.is_reference for trial in trials) == 16 and {t.model.layers for t in trials} == {
        1,
        MODELS["quick"].layers,
    }


@pytest.mark.parametrize(
    ("when", "left_out"),
    [
        ({"optimizer": "muon", "format": ["E7M0"]}, 2 * 2),
        ({"optimizer.rung_clip": 3}, 2 * 2 * 2),
        ({"optimizer.lr": {"low": 1.5e-3}, "format": "e5m2"}, (1 + 2) * 2),
        ({"optimizer.lr": {"high": 1.5e-3}, "optimizer": "grid"}, 2 * 2 * 2),
        ({"schedule.kind": "cosine"}, 0),
    ],
    ids=str,
)
def test_a_constraint_leaves_out_what_it_names_and_counts_it(when: dict, left_out: int) -> None:
    space = {
        "formats": "E5M2,E7M0",
        "optimizers": "muon,grid",
        "seeds": 2,
        "axes": {"optimizer.lr": [1e-3, 2e-3], "grid.rung_clip": [1, 3]},
    }
    found = spec(**space, constraints=[{"name": "no_such", "when": when, "reason": "measured"}])
    (exclusion,) = [item for item in found.exclusions() if item.rule == "no_such"]
    assert (exclusion.trials, exclusion.reason) == (left_out, "measured")
    assert len(cells(found)) == 2 * 2 * (2 + 4) - left_out


def test_a_constraint_makes_an_invalid_combination_no_error() -> None:
    axes = {"model.heads": [2, 3], "model.width": [64, 96]}
    with pytest.raises(ValidationError, match=r"heads=3.* makes no valid trial .*a constraint can leave it out"):
        spec(axes=axes)
    found = spec(axes=axes, constraints=[{"name": "divides", "when": {"model.heads": 3, "model.width": 64}}])
    assert {(t.model.heads, t.model.width) for t in found.expand()} == {(2, 64), (2, 96), (3, 96)}


def test_each_cell_runs_at_the_rate_settled_for_it() -> None:
    arms, formats = "adamw,manifold,manifold_fp32", "E0M7,E7M0,BF16,FP32"
    space = {"formats": formats, "optimizers": arms, "policies": "uniform,uniform_full", "seeds": 2}
    alone = [(config.format, config.arm, config.policy) for config in spec(**space | {"seeds": 1}).expand()]

    def settled(rates: Mapping[tuple[str, str, str], float]) -> SweepSpec:
        nested: dict[str, Any] = {}
        for (format, arm, policy), lr in rates.items():
            nested.setdefault(format, {}).setdefault(arm, {})[policy] = lr
        return spec(**space, settled_lrs=nested)

    given = {key: (1 + place) * 1e-4 for place, key in enumerate(alone)}
    trials = settled(given).expand()
    assert {(trial.format, trial.arm, trial.policy): trial.optimizer.lr for trial in trials} == given
    assert len(trials) == 2 * len(given) and settled(given).exclusions() == spec(**space).exclusions()
    assert settled(dict.fromkeys(alone, 3e-3)).expand() == spec(**space, lrs=3e-3).expand()


WRONG = [
    ("axes: {optimizer.beta3: [1]}", ["axes", "'optimizer.beta3' is no axis", "nearest: optimizer.beta2"]),
    ("axes: {lion.lr: [1]}", ["the sweep has no arm lion"]),
    ("optimizers: adamw\naxes: {optimizer.momentum: [1]}", ["none of adamw has it, but grid"]),
    ("axes: {optimizer.beta2: []}", ["optimizer.beta2: [] names nothing"]),
    ("axes: {optimizer.beta2: [1.5]}", ["optimizer.beta2: 1.5 is not allowed", "less than 1"]),
    ("axes: {schedule.kind: [cosin]}", ["'cosin'", "'constant', 'cosine' or 'wsd'"]),
    ("axes: {model: [quik]}", ["model: 'quik'", "nearest: quick"]),
    ("axes: {data.batch: [yes]}", ["data.batch: True is not allowed"]),
    ("axes: {seed: [1]}", ["replicates are seeds: N"]),
    ("axes: {guards: [[]]}", ["can't change what a training computes"]),
    ("axes: [a]", ["a mapping of paths"]),
    ("axes: {optimizer.lr: {low: 1.0e-4, high: 1.0e-2}}", ["a range can't be enumerated"]),
    ("search: random\naxes: {optimizer.lr: {low: 1.0, high: 0.1}}", ["low=1 must be less than high=0.1"]),
    ("search: random\naxes: {optimizer.lr: {low: 1.0, hihg: 0.1}}", ["optimizer.lr.hihg: unknown key"]),
    ("search: random\naxes: {schedule.kind: {low: 1.0, high: 2}}", ["a range is for numbers"]),
    ("lrs: [0.1]\naxes: {optimizer.lr: [0.1]}", ["lrs is the same axis"]),
    ("settled_lrs: {E5M2: {adamw: {uniform: 0}}}", ["settled_lrs.E5M2.adamw.uniform"]),
    ("settled_lrs: {E9M9: {adamw: {uniform: 0.1}}}", ["'E9M9' is no usable format"]),
    ("settled_lrs: {E5M2: {admaw: {uniform: 0.1}}}", ["'admaw' is no arm", "nearest: adamw"]),
    ("settled_lrs: {BF16: {adamw: {uniform: 0.1}}}", ["settled_lrs: no rate for E5M2 grid uniform"]),
    ("lrs: [0.1]\nsettled_lrs: {E5M2: {adamw: {uniform: 0.1}}}", ["lrs says the same"]),
    ("search: random\nsettled_lrs: {E5M2: {adamw: {uniform: 0.1}}}", ["each cell has one rate"]),
    ("constraints: [{name: all, when: {format: [E5M2, BF16]}}]", ["nothing is left to run by all"]),
    ("search: optuna\nconstraints: [{name: all, when: {format: [E5M2]}}]", ["draws gave no valid", "the first: all"]),
    ("constraints: [{name: x, when: {fromat: E5M2}}]", ["'fromat' is no key for x", "nearest: format"]),
    ("constraints: [{name: x, when: {format: E9M9}}]", ["'E9M9' is no usable format"]),
    ("constraints: [{name: x, when: {optimizer: admaw}}]", ["'admaw' is no arm", "nearest: adamw"]),
    ("constraints: [{name: x, wen: {optimizer: grid}}]", ["constraints.0"]),
    ("search: gird", ["'gird' is not allowed", "nearest: grid"]),
    ("num_samples: 5", ["belongs to search='random' or 'optuna'"]),
    ("search: optuna\nobjectives: val_los", ["'val_los' is no objective", "nearest: val_loss"]),
    ("search: optuna\nobjectives: [val_loss, flip_yield]\nscheduler: asha", ["a race compares one number"]),
    ("search: random\naxes: {data.tokenizer: [bytes, bpe]}", ["nats per token", "bits_per_byte can"]),
    ("scheduler: hyperband", ["'hyperband' is not offered: it runs NaN trials to their end", "pbt"]),
    ("scheduler: pbt", ["a population has 2 or more members"]),
    ("scheduler: pbt\nlrs: [0.001, 0.002]\npbt: {interval: 30}", ["pbt.interval=30", "eval_interval=20"]),
    ("scheduler: pbt\nsearch: random\nlrs: [0.001, 0.002]", ["starts from a grid"]),
    ("model:\n\tlayers: 2", ["line 4: a tab in '\\tlayers: 2'; YAML takes spaces"]),
    ("axes: {a: 1", ["line 4, column 1: not readable as yaml"]),
]


@pytest.mark.parametrize(("text", "expected"), WRONG, ids=[text.replace("\n", " ") for text, _ in WRONG])
def test_a_wrong_spec_is_one_clear_line(
    text: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arms = "" if "optimizers:" in text else "optimizers: grid\n"
    (tmp_path / "mine.yaml").write_text(f"formats: E5M2\n{arms}{text}\n")
    assert main(["run", "mine.yaml"]) == 2
    error = capsys.readouterr().err
    for part in ["mine.yaml", *expected]:
        assert part in error
    assert error.count("\n") == 1 and [item.name for item in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("flags", [["--workers-per-trial", "2"], ["--executor", "train"]])
def test_a_population_is_of_one_device_trials(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--scheduler", "pbt", "--lrs", "1e-3,2e-3", *flags]) == 2
    error = capsys.readouterr().err
    assert flags[0] in error and "populations are of one-device trials" in error and error.count("\n") == 1


def test_python_yaml_and_json_spell_the_same_sweep(tmp_path: Path) -> None:
    said = {
        "axes": {"optimizer.beta2": [0.9, 0.95], "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        "constraints": [{"name": "x", "when": {"optimizer.lr": {"high": 2e-4}, "format": "E7M0"}}],
        "search": "random",
        "num_samples": 3,
        "formats": ["E5M2", "E7M0"],
        "optimizers": ["adamw"],
    }
    (tmp_path / "mine.json").write_text(json.dumps(said))
    (tmp_path / "mine.yaml").write_text(
        "formats: E5M2,E7M0\noptimizers: adamw\nsearch: random\nnum_samples: 3\naxes:\n  optimizer.beta2: [.9, .95]\n"
        "  optimizer.lr: {low: 1e-4, high: 1e-2, log: true}\nconstraints:\n- name: x\n"
        "  when: {optimizer.lr: {high: 2e-4}, format: E7M0}\n"
    )
    read = [resolve(SweepSpec(), {}, tmp_path / f"mine.{suffix}") for suffix in ("json", "yaml")]
    assert read[0] == read[1] == SweepSpec.model_validate(said | {"name": "mine"})
    assert SweepSpec.model_validate_json(read[0].model_dump_json()) == read[0]


def test_the_schema_takes_what_the_spec_takes_and_refuses_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(json.dumps(json_schema()))
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    for said in (
        {"formats": "E5M2", "guards": "off", "model": "quick", "lrs": 0.1},
        {"axes": {"optimizer.lr": {"low": 1, "high": 2}}, "search": "random"},
        {"constraints": [{"name": "x", "when": {"format": "E5M2", "optimizer.lr": {"low": 0.1}}}]},
        {"guards": ["flip_yield/min < 0.2 for 3 after 50"]},
        SweepSpec().model_dump(mode="json"),
    ):
        assert not list(check.iter_errors(said)), said
        SweepSpec.model_validate(said)
    for said in (
        {"formts": "E5M2"},
        {"steps": "many"},
        {"search": "gird"},
        {"model": {"layer": 3}},
        {"axes": {"optimizer.lr": 3}},
        {"constraints": [{"when": {}}]},
        {"pbt": {"quantile": 2}},
    ):
        assert list(check.iter_errors(said)), said
        with pytest.raises(ValidationError):
            SweepSpec.model_validate(said)


def test_the_originals_experiments_are_all_there() -> None:
    assert [path.stem for path in CONFIGS] == EXPERIMENTS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_experiment_loads_and_plans_as_a_sweep_of_one_with_its_reference(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unmeasured: None
) -> None:
    monkeypatch.chdir(tmp_path)
    trials = resolve(SweepSpec(), {}, path).expand()
    assert trials[0].is_reference and trials[0].format == "BF16"
    own = trials[-1]
    assert len(trials) == (1 if path.stem == "bf16_baseline" else 2) and own.format.lower() == path.stem.split("_")[0]
    assert (own.observe.shadow_every is not None) == (path.stem == "e5m2_fp8")
    assert own.use_manifold_aware == (path.stem == "e5m2_manifold")
    assert main(["plan", str(path)]) == 0
    assert f"{len(trials)} trials of 2000 steps" in capsys.readouterr().out and not list(tmp_path.iterdir())
