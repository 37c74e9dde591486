"""A spec becomes the right trials, once each, in the right order, and their ids mean what they should."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from altgrad.sweep.space.declaration import ALL_FORMATS, BASE, TEMPLATE
from altgrad.sweep.space.presets import PRESETS
from altgrad.sweep.space.resolve import SpecError, resolve
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import BASELINE, TrainConfig

SHA = "a" * 64


def names(spec: SweepSpec) -> list[tuple[str, str, str, int]]:
    return [(trial.format, trial.arm, trial.policy, trial.seed) for trial in spec.expand()]


def test_references_stand_first_and_once() -> None:
    spec = SweepSpec(formats=("E5M2", "BF16", "FP32"), optimizers=("grid", "adamw"), seeds=2)
    found = names(spec)
    assert found[:4] == [(format, "adamw", "uniform", seed) for format in ("BF16", "FP32") for seed in (0, 1)]
    assert len(found) == len(set(found)) == 2 * (2 + 1 + 2)
    assert [trial.is_reference for trial in spec.expand()] == [True] * 4 + [False] * 6


@pytest.mark.parametrize("optimizers", [("manifold",), ("adamw",)])
def test_the_baseline_is_always_there(optimizers: tuple[str, ...]) -> None:
    found = names(SweepSpec(formats=("E5M2",), optimizers=optimizers, policies=("attention_bf16",), seeds=3))
    assert found[:3] == [(BASELINE, "adamw", "uniform", seed) for seed in range(3)]
    assert found[3:] == [("E5M2", optimizers[0], "attention_bf16", seed) for seed in range(3)]


def test_seeds_of_a_group_are_adjacent() -> None:
    spec = SweepSpec(optimizers=("adamw", "grid"), lrs=(1e-3, 3e-3), rung_clip=(1, 10), seeds=3)
    trials = spec.expand()
    assert len(trials) % 3 == 0
    for start in range(0, len(trials), 3):
        group = trials[start : start + 3]
        assert [trial.seed for trial in group] == [0, 1, 2]
        assert len({trial.model_dump_json(exclude={"seed"}) for trial in group}) == 1


def test_seeds_count_from_the_first() -> None:
    pilot = SweepSpec(formats=("E5M2",), optimizers=("adamw",), seeds=2)
    judged = pilot.changed(first_seed=2)
    assert [config.seed for config in judged.expand()] == [2, 3] * 2
    assert not pilot.trials("a").keys() & judged.trials("a").keys(), "no trial serves both"
    assert pilot.changed(first_seed=0).trials("a") == pilot.trials("a")


def test_rung_clip_multiplies_only_arms_that_have_rungs() -> None:
    spec = SweepSpec(formats=("E5M2",), optimizers=("adamw", "grid"), rung_clip=(1, 3, 10), seeds=1)
    clips = [getattr(trial.optimizer, "rung_clip", None) for trial in spec.expand() if trial.format == "E5M2"]
    assert clips == [None, 1, 3, 10]


def test_fp32_runs_as_reference_only_and_the_rest_is_counted() -> None:
    spec = SweepSpec(
        formats=("FP32",),
        optimizers=("adamw", "manifold", "grid"),
        policies=("uniform", "head_bf16"),
        rung_clip=(1, 3),
        seeds=2,
    )
    assert {name[:3] for name in names(spec) if name[0] == "FP32"} == {("FP32", "adamw", "uniform")}
    (exclusion,) = spec.exclusions()
    assert (exclusion.rule, exclusion.trials) == ("fp32_is_the_reference", 2 * (1 + 2 + 1 + 1 + 2))


def test_what_is_expanded_and_what_is_excluded_make_the_whole_product() -> None:
    spec = SweepSpec(formats=("all",), optimizers=("all",), policies=("all",), seeds=2)
    product = len(ALL_FORMATS) * len(ARMS) * len(spec.policies) * 2
    assert len(spec.expand()) + sum(exclusion.trials for exclusion in spec.exclusions()) == product


def test_a_learning_rate_in_rungs_is_not_multiplied_by_rates_in_weight_units() -> None:
    spec = SweepSpec(formats=("E5M2",), optimizers=("grid_literal", "grid"), lrs=(1e-3, 2e-3), seeds=2)
    lrs = [(trial.arm, trial.optimizer.lr) for trial in spec.expand() if trial.format == "E5M2" and trial.seed == 0]
    assert lrs == [("grid_literal", ARMS["grid_literal"].lr), ("grid", 1e-3), ("grid", 2e-3)]
    assert [(item.rule, item.trials) for item in spec.exclusions()] == [("raw_unit_has_its_own_lr", 4)]


def test_a_policy_with_formats_of_its_own_runs_once_under_the_first_8_bit_format() -> None:
    spec = SweepSpec(formats=("BF16", "E3M4", "E5M2"), optimizers=("adamw", "grid"), policies=("classic",), seeds=2)
    assert names(spec)[2:] == [("E3M4", arm, "classic", seed) for arm in ("adamw", "grid") for seed in (0, 1)]
    assert [(item.rule, item.trials) for item in spec.exclusions()] == [("policy_names_its_own_formats", 2 * 2 * 2)]


def test_bf16_under_a_policy_that_spares_layers_is_the_uniform_one() -> None:
    spec = SweepSpec(
        formats=("BF16",),
        optimizers=("adamw",),
        seeds=2,
        policies=("uniform", "uniform_act", "uniform_full", "attention_bf16", "head_bf16"),
    )
    assert names(spec) == [("BF16", "adamw", "uniform", 0), ("BF16", "adamw", "uniform", 1)]
    assert [(item.rule, item.trials) for item in spec.exclusions()] == [("bf16_everywhere_is_uniform", 8)]


def test_what_no_policy_changes_runs_once_and_as_the_uniform_one() -> None:
    values = {"formats": ("E4M3", "BF16"), "optimizers": ("manifold", "manifold_fp32"), "seeds": 1}
    controls = [("E4M3", "manifold_fp32", "uniform", 0), ("BF16", "manifold_fp32", "uniform", 0)]
    both = SweepSpec(policies=("uniform", "uniform_full"), **values)
    assert [name for name in names(both) if name[1] == "manifold_fp32"] == controls
    assert {item.rule: item.trials for item in both.exclusions()} == {
        "bf16_everywhere_is_uniform": 2,
        "float32_operands_are_uniform": 1,
    }
    alone = SweepSpec(policies=("uniform_full",), **values)
    assert [name for name in names(alone) if name[2] == "uniform"] == [
        ("BF16", "adamw", "uniform", 0),
        controls[0],
        ("BF16", "manifold", "uniform", 0),
        controls[1],
    ]
    spared = SweepSpec(policies=("attention_bf16",), **values)
    assert ("E4M3", "manifold_fp32", "attention_bf16", 0) in names(spared), "its spacings are another's"


def test_references_exist_at_every_learning_rate_and_repeats_are_dropped() -> None:
    spec = SweepSpec(formats=("E5M2", "E5M2", "BF16"), optimizers=("adamw",), lrs=(1e-3, 2e-3, 1e-3), seeds=1)
    assert [(trial.format, trial.optimizer.lr) for trial in spec.expand()] == [
        ("BF16", 1e-3),
        ("BF16", 2e-3),
        ("E5M2", 1e-3),
        ("E5M2", 2e-3),
    ]


def test_all_means_every_registered_format() -> None:
    assert set(SweepSpec(formats=("all",)).formats) == {
        "E0M7",
        "E1M6",
        "E2M5",
        "E3M4",
        "E4M3",
        "E5M2",
        "E6M1",
        "E7M0",
        "BF16",
        "FP16",
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_expand(preset: str) -> None:
    assert len(PRESETS[preset].expand()) >= 30


def test_an_invalid_trial_is_found_when_the_spec_is_made() -> None:
    with pytest.raises(ValidationError, match="eval_interval=15 must be a multiple of log_interval=10"):
        SweepSpec(eval_interval=15)


def config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"format": "E5M2"} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"source": "elsewhere.txt"}},
        {"guards": []},
        {"steps": 700},
        {"log_interval": 5},
        {"eval_interval": 100},
        {"checkpoint_interval": 10},
    ],
)
def test_the_id_ignores_what_cannot_change_numbers(changes: dict[str, object]) -> None:
    assert config(**changes).trial_id(SHA) == config().trial_id(SHA)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"format": "E4M3"},
        {"policy": "head_bf16"},
        {"optimizer": {"kind": "adamw", "lr": 1e-3}},
        {"optimizer": {"kind": "grid"}},
        {"data": {"batch": 4}},
        {"model": {"layers": 3}},
        {"clip_grad_norm": None},
        {"schedule": {"kind": "cosine"}},
    ],
)
def test_the_id_depends_on_what_can(changes: dict[str, object]) -> None:
    assert config(**changes).trial_id(SHA) != config().trial_id(SHA)


def test_the_id_depends_on_the_content_of_the_data() -> None:
    assert config().trial_id(SHA) != config().trial_id("b" * 64)


def test_steps_belong_to_the_id_where_the_schedule_depends_on_them() -> None:
    cosine = {"schedule": {"kind": "cosine"}}
    assert config(**cosine, steps=200).trial_id(SHA) != config(**cosine, steps=100).trial_id(SHA)


def test_the_name_of_a_sweep_is_in_no_id() -> None:
    assert list(SweepSpec(name="one").trials(SHA)) == list(SweepSpec(name="two").trials(SHA))


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_says_what_the_value_says_and_flags_win(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    path.write_text(json.dumps({"formats": "E5M2,E4M3", "steps": 7, "model": {"layers": 1}, "seeds": 4}))
    spec = resolve(SweepSpec(), {"steps": "9", "data.source": "x.txt", "guards": "off"}, path)
    assert spec == SweepSpec(
        name="mine",
        formats=("E5M2", "E4M3"),
        steps=9,
        seeds=4,
        guards=(),
        model=SweepSpec().base.model.model_copy(update={"layers": 1}),
        data=SweepSpec().base.data.model_copy(update={"source": "x.txt"}),
    )


def test_yaml_on_and_off_are_booleans_and_still_mean_guards(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("guards: off\n")
    assert resolve(SweepSpec(), {}, path).guards == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("formts: [E5M2]", ["formts", "['E5M2']", "formats, optimizers", "nearest: formats"]),
        ("model: {layer: 3}", ["model.layer", "3", "heads", "nearest: layers"]),
        (
            "guards: [{kind: stalled, signal: flip_yield, test: below, limit: 0.2, check: 3}]",
            ["guards.0.check", "after_step", "nearest: checks"],
        ),
        ("optimizers: [admaw]", ["optimizers", "admaw", "manifold", "nearest: adamw"]),
        ("steps: -4", ["steps", "-4", "greater than or equal to 1"]),
        ("- a", ["a mapping of keys is expected, found list"]),
        ("a: [", ["not readable as yaml"]),
        ("steps: 10\nseeds: 2\nsteps: 20", ["line 3", "'steps' stands there twice, first in line 1"]),
        ("data:\n  batch: 4\n  batch: 8", ["line 3", "'batch' stands there twice"]),
        ("steps: 0100", ["line 1", "0100 would be read as 64"]),
        ("seeds: 2\nsteps: 1:40", ["line 2", "1:40 would be read as 100"]),
        ("lrs: [1:30.5]", ["line 1", "1:30.5 would be read as 90.5"]),
    ],
)
def test_an_error_in_a_file_names_path_value_allowed_and_nearest(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        resolve(SweepSpec(), {}, path)
    for part in [str(path), *expected]:
        assert part in str(caught.value)


def test_equal_keys_in_json_are_an_error_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"steps": 1, "steps": 2}')
    with pytest.raises(SpecError, match="'steps' stands there twice"):
        resolve(SweepSpec(), {}, path)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{}")
    with pytest.raises(SpecError, match=r"no such file; nearest: mine\.yaml"):
        resolve(SweepSpec(), {}, tmp_path / "mne.yaml")


def test_presets_have_folders_of_their_own() -> None:
    assert len({spec.name for spec in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize(("stem", "name"), [("my sweep", "my_sweep"), ("-é (2)", "e_2"), ("..", None), ("日本", None)])
def test_a_file_of_any_name_gives_a_valid_name_of_its_own(tmp_path: Path, stem: str, name: str | None) -> None:
    path = tmp_path / f"{stem}.yaml"
    path.write_text("seeds: 1\n")
    found = resolve(SweepSpec(), {}, path).name
    assert found == name if name else found.startswith("sweep-")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("seeds: yes", "seeds: True"),
        ("steps: true", "steps: True"),
        ("lrs: [on]", "lrs: True"),
        ("rung_clip: on", "rung_clip: True"),
        ("model: {layers: on}", "model: layers=True"),
        ("guards: [{kind: stalled, signal: flip_yield, test: below, limit: yes}]", "guards: limit=True"),
    ],
)
def test_yes_is_no_number(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=f"{where} is not allowed"):
        resolve(SweepSpec(), {}, path)


@pytest.mark.parametrize("text", ["formats: []", "formats: ' , '", "optimizers: ''", "policies: []"])
def test_an_axis_without_a_point_names_the_choices(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"names nothing; allowed: .*all"):
        resolve(SweepSpec(), {}, path)


@pytest.mark.parametrize(("steps", "rungs"), [(100, [34, 68]), (300, [100, 200]), (21, [20])])
def test_the_first_rung_follows_the_steps(steps: int, rungs: list[int]) -> None:
    spec = SweepSpec(steps=steps, scheduler="asha")
    assert spec.race.rungs(spec.base.steps, spec.base.eval_interval) == rungs


@pytest.mark.parametrize(
    "changes", [{"steps": 20}, {"steps": 30, "race": {"first_rung": 30}}, {"steps": 40, "race": {"first_rung": 21}}]
)
def test_a_race_without_a_comparison_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"scheduler='asha' with steps=\d+ would compare nothing"):
        SweepSpec.model_validate({"scheduler": "asha"} | changes)
    SweepSpec.model_validate(changes)


def test_no_field_of_a_trial_is_declared_twice() -> None:
    own = set(SweepSpec.model_fields)
    assert not own & set(TrainConfig.model_fields), "what trials share stands in base alone"
    for name in TEMPLATE:
        value = getattr(BASE, name)
        assert getattr(SweepSpec(**{name: value}), name) == value, "and is read and given at the sweep's own level"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"base": {"format": "E4M3"}}, "base.format is given by an axis of the sweep: formats"),
        ({"base": {"optimizer": {"kind": "grid"}}}, "base.optimizer is given by an axis of the sweep: optimizers"),
        ({"base": {"stesp": 3}}, "stesp"),
    ],
)
def test_a_template_holds_what_trials_share_alone(given: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SweepSpec(**given)


def test_a_sweep_is_the_same_from_its_template_and_from_flat_keys() -> None:
    flat = SweepSpec(
        steps=40, schedule={"kind": "cosine"}, data={"batch": 4}, recipe={"gradient": {"rounding": "stochastic"}}
    )
    nested = SweepSpec(base=flat.base.model_dump(exclude={"format", "policy", "optimizer", "seed"}))
    assert nested == flat == SweepSpec.model_validate(flat.model_dump(mode="json"))
    assert SweepSpec(base={"eval_interval": 20}, steps=40).base.steps == 40
