"""What people type and keep: the flags of every command, the keys of a file, the ids of trials.

A change here breaks somebody's scripts, files or ledgers, and is made on purpose or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import pytest

from altgrad.cli import _parser
from altgrad.sweep.space.presets import PRESETS
from altgrad.sweep.space.resolve import resolve
from altgrad.sweep.space.schema import json_schema
from altgrad.sweep.space.spec import SweepSpec

SWEEP = """
--address --config --data --equal-within --executor --first-seed --formats --fresh --gpus-per-trial --guards
--interval-timeout --keep-checkpoints --label-field --lrs --margin --max-concurrent --max-gpu-hours --max-hours
--max-usd --mix-devices --model --num-samples --objectives --optimizers --out --plan --policies --preset
--rung-clip --scheduler --search --seeds --steps --task --tokenizer --usd-per-gpu-hour --wandb
--workers-per-trial file
"""
COMMANDS = {
    "plan": SWEEP,
    "run": SWEEP,
    "submit": f"{SWEEP} --send",
    "status": "out",
    "report": "out --equal-within --group --margin --to --wandb",
    "compare": "out other --equal-within --margin",
    "why": "out trial",
    "best": "out --export --per",
    "export": "out folder --lean",
    "import": "folder out",
    "wandb-sync": "out --mode",
    "schema": "",
    "formats": "names",
    "test-matrix": "--check",
    "doctor": "",
    "cluster": "words",
}
KEYS = """
name base formats optimizers policies lrs settled_lrs rung_clip axes constraints search num_samples objectives
search_seed seeds first_seed margin equal_within scheduler race pbt task model data recipe schedule clip_grad_norm
interventions guards observe steps log_interval eval_interval checkpoint_interval
"""
CONFIGS = Path(__file__).parents[2] / "sweeps" / "configs"
SEARCH = {"optimizer.beta2": [0.9, 0.95], "schedule.kind": ["constant", "cosine"]}
SWEEPS = {
    **PRESETS,
    "search": SweepSpec(search="random", num_samples=12, axes=SEARCH, lrs=(1e-3, 2e-3)),
    "population": SweepSpec(scheduler="pbt", lrs=(1e-3, 2e-3), steps=100),
}
IDS = {
    "quick": "4f004d1bf98f",
    "standard": "0d3771363788",
    "study": "42e51237dbf8",
    "bf16_baseline.yaml": "68a7d78fc4de",
    "e0m7_uniform.yaml": "4d981fa0ea73",
    "e1m6_uniform.yaml": "611fa89504c2",
    "e3m4_uniform.yaml": "357e4d60f163",
    "e5m2_fp8.yaml": "14d2b7d7053e",
    "e5m2_manifold.yaml": "9f853085d3e8",
    "e5m2_standard.yaml": "14d2b7d7053e",
    "e7m0_uniform.yaml": "f81ed7883da1",
    "search": "c01d920d7417",
    "population": "e1e1b42493e5",
}
"""Of all trial ids of a sweep, as they were with numerics 3 at commit 9f276ae."""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_a_command_are_these(command: str) -> None:
    parser = _parser([command])
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    flags = {option for action in actions for option in action.option_strings if option.startswith("--")} - {"--help"}
    names = {action.dest for action in actions if not action.option_strings}
    assert flags | names == set(COMMANDS[command].split())
    assert set(commands.choices) == set(COMMANDS)


def test_the_keys_of_a_file_are_these() -> None:
    assert set(json_schema()["properties"]) == set(KEYS.split())


@pytest.mark.parametrize("name", IDS)
def test_trials_keep_their_ids(name: str) -> None:
    spec = SWEEPS[name] if name in SWEEPS else resolve(SweepSpec(), {}, CONFIGS / name)
    ids = " ".join(sorted(spec.trials("a" * 64)))
    assert hashlib.sha256(ids.encode()).hexdigest()[:12] == IDS[name]
