"""What a person's own sweep file gets wrong is told as what it is, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from smallest import SMALLEST

from altgrad.cli import main
from altgrad.quantization import FORMATS, POLICIES, LayerRule
from altgrad.registry import Registry
from altgrad.sweep.complaints import headline
from altgrad.sweep.engine.faults import told
from altgrad.sweep.run import preflight
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.arm_configs import ARMS, ManifoldAdamWConfig, RoundedAdamWConfig
from altgrad.training.catalogue import SIGNALS, Signal
from altgrad.training.outcome import OutcomeKind
from altgrad.training.rules import RULES, sgdm

ROOT = Path(__file__).parents[2]
FILE = f"""
import sys
from altgrad.cli import sweep_main
from altgrad.sweep import SweepSpec
SMALLEST = {SMALLEST!r} | {{"seeds": 1, "steps": 10}}
"""
GUARDED = '\nif __name__ == "__main__":\n    sys.exit(sweep_main(SWEEP))'
POLICY = "from altgrad.quantization import POLICIES\nPOLICIES[{name!r}] = {value}\nSWEEP = SweepSpec(**SMALLEST{more})"
BODIES = {
    "a policy": (
        POLICY.format(name="mine", value="lambda fmt: ()", more=", policies=['mine']"),
        "policies: 'mine' is known to this program alone",
    ),
    "a policy that raises": (
        POLICY.format(name="mine", value="lambda fmt: 1 / 0", more=", policies=['mine']"),
        "policies: 'mine' is known to this program alone",
    ),
    "a policy replaced": (
        POLICY.format(name="uniform", value="lambda fmt: ()", more=""),
        "policies: 'uniform' is replaced by this program",
    ),
    "a format": (
        "from altgrad.quantization import FORMATS, FloatFormat\nFORMATS['MINE'] = FloatFormat(4, 3, 'finite')\n"
        "SWEEP = SweepSpec(**SMALLEST | {'formats': ['MINE']})",
        "formats: 'MINE' is no usable format",
    ),
    "a signal": (
        "from altgrad.training.catalogue import SIGNALS, Signal\nSIGNALS['mine'] = Signal('x', 'y')\n"
        "SWEEP = SweepSpec(**SMALLEST | {'guards': 'mine > 3 for 2'})",
        "guards: 'mine' is known to this program alone",
    ),
    "an arm": (
        "from altgrad.training.config import ARMS, RoundedAdamWConfig\nARMS['mine'] = RoundedAdamWConfig(lr=1)\n"
        "SWEEP = SweepSpec(**SMALLEST | {'optimizers': ['mine']})",
        "optimizers: 'mine' is known to this program alone",
    ),
    "a rule before the command line": (
        "SWEEP = SweepSpec(**SMALLEST | {'optimizers': ['mine']})",
        "optimizers: 'mine' is no arm",
    ),
    "a wrong value": ("SWEEP = SweepSpec(**SMALLEST | {'steps': -1})", "steps: -1 is not allowed"),
    "an unknown key": ("SWEEP = SweepSpec(**SMALLEST, colour=1)", "colour: 1 is not allowed: extra inputs"),
    "what can't be pickled": ("SWEEP = SweepSpec(**SMALLEST | {'lrs': (lambda: 1,)})", "lrs.0: <function <la"),
}
RULE = (
    "from altgrad.training.rules import RULES, Rule, sgdm\nRULES['mine'] = Rule(sgdm, ('exp_avg',), 'x', {'lr': 1.0})"
)


def called(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The folder's mine.py, run with these words."""
    return subprocess.run(
        [sys.executable, "mine.py", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("mistake", ["a policy that raises", "a rule before the command line", "a wrong value"])
def test_what_a_sweep_file_gets_wrong_is_one_line(tmp_path: Path, mistake: str) -> None:
    body, said = BODIES[mistake]
    text = FILE + body + GUARDED
    (tmp_path / "mine.py").write_text(RULE + text if "is no arm" in said else text)
    done = called(tmp_path, "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done
    assert "mine.py:" in done.stderr and said in done.stderr and "errors.pydantic.dev" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def registries() -> Iterator[None]:
    kept = [(registry, dict(registry)) for registry in (POLICIES, FORMATS, ARMS, RULES, SIGNALS)]
    yield
    for registry, entries in kept:
        registry.clear()
        registry.update(entries)


class Mine(ManifoldAdamWConfig):
    """One of a program's own, under AltGrad's own kind."""


@pytest.mark.parametrize(
    ("registry", "name", "value", "asked"),
    [
        (POLICIES, "classic", lambda fmt: (LayerRule(pattern=""),), {"policies": "classic"}),
        (ARMS, "adamw", RoundedAdamWConfig(lr=1.0), {}),
        (RULES, "lion", RULES["muon"], {"optimizers": "lion"}),
        (RULES, "sgdm", sgdm, {"optimizers": "sgdm"}),
        (SIGNALS, "grad_norm", Signal("another", "unit"), {"guards": "grad_norm > 3 for 2"}),
        (SIGNALS, "stall_ratio", Signal("another", "unit", row="max"), {"guards": "stall_ratio/max > .9 for 2"}),
        (
            SIGNALS,
            "val_loss",
            Signal("another", "unit"),
            {"interventions": [{"kind": "format_shift", "rules": ["val_loss is nonfinite"]}]},
        ),
    ],
)
def test_a_sweep_names_only_what_its_workers_have(
    registries: None, registry: Registry[Any], name: str, value: object, asked: dict[str, Any]
) -> None:
    SweepSpec.model_validate(SMALLEST | asked)
    registry[name] = value
    with pytest.raises(ValidationError, match=f"'{name}' is replaced by this program"):
        SweepSpec.model_validate(SMALLEST | asked)


def test_what_a_sweep_does_not_name_may_be_anything(registries: None) -> None:
    POLICIES["mine"] = lambda fmt: ()
    SweepSpec.model_validate(SMALLEST)


def test_a_configuration_that_does_not_reach_the_workers_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from altgrad.training.config import TrainConfig

    spec = SweepSpec.model_validate(SMALLEST | {"seeds": 1, "steps": 10})
    monkeypatch.setattr(SweepSpec, "expand", lambda self: [TrainConfig(optimizer=Mine())])
    with pytest.raises(ValueError, match="Mine of this program does not reach a sweep's workers whole"):
        preflight(spec)


SUBMITTED = {
    "an error": ("1 / 0", "mine.py:6: ZeroDivisionError: division by zero"),
    "an error in another module": ("import other", "mine.py:6: KeyError: 'what'"),
    "a module that is not there": ("import nothere", "mine.py:6: ModuleNotFoundError: No module named 'nothere'"),
    "an exit": ("sys.exit(3)", "mine.py:6: SystemExit: 3"),
    "no guard": ("SWEEP = SweepSpec(**SMALLEST)\nsweep_main(SWEEP)", '`if __name__ == "__main__":`'),
    "no sweep": ("", "holds 0 sweeps; one SweepSpec is expected"),
    "no Python": ("SWEEP = (", "SyntaxError: '(' was never closed"),
} | BODIES


@pytest.mark.parametrize(("body", "said"), SUBMITTED.values(), ids=SUBMITTED)
def test_what_is_submitted_is_read_first(
    registries: None,
    tmp_path: Path,
    body: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mine.py").write_text(FILE + body)
    (tmp_path / "other.py").write_text("raise KeyError('what')")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["submit", str(tmp_path / "mine.py"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and "errors.pydantic.dev" not in error


@pytest.mark.slow
def test_a_plan_runs_no_sweep_file_a_second_time(tmp_path: Path) -> None:
    body = 'print("read")\nSWEEP = SweepSpec(**SMALLEST)\nsys.exit(sweep_main(SWEEP))'
    (tmp_path / "mine.py").write_text(FILE + body)
    done = called(tmp_path, "--plan")
    assert done.returncode == 0 and done.stdout.count("read\n") == 1 and "estimate" in done.stdout, done


class Config(BaseModel):
    format: str = "E5M2"
    steps: int


def test_no_message_ends_in_an_address(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as error:
        Config.model_validate({"steps": "x"})
    assert headline(error.value).startswith("steps: 'x' is not allowed: input should be a valid integer")
    text = f'Traceback (most recent call last):\n  File "config.py", line 1, in f\n{error.value}\n'
    outcome = told(
        text + "    For further information visit https://errors.pydantic.dev/2/v/int_parsing\n", 0, tmp_path
    )
    assert outcome.kind is OutcomeKind.BUG and outcome.message.startswith("steps: Input should be a valid integer")
