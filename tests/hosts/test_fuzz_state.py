"""Random state is loaded exactly or refused, and never reaches a kernel unchecked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("first", "rounds"), [(0, 200), pytest.param(1000, 2000, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_random_state_is_loaded_exactly_or_refused(first, rounds):
    script = Path(__file__).with_name("fuzz_state.py")
    done = subprocess.run(
        [sys.executable, script, str(first), str(rounds)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ends = ast.literal_eval(done.stdout)
    assert sum(ends.values()) == rounds and min(ends.values()) > rounds / 5, ends
