"""Imports run down only, and importing the package is light."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import altgrad.sweep
import altgrad.training
from altgrad import cli
from altgrad.sweep import Ledger, SweepSpec

PACKAGE = Path(__file__).parents[2] / "altgrad"
FLOORS = ("quantization", "training", "sweep", "analysis", "results", "commands", "cli")
HEAVY = ("ray", "wandb", "datasets", "matplotlib")
COMPILERS = ("torch._dynamo", "torch._inductor", "triton", "numba")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def floor_of(path: Path) -> int:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return FLOORS.index(part) if part in FLOORS else len(FLOORS)


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_run_down_only():
    upward = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in SOURCES
        for name in imported(path)
        if name.partition(".")[0] == "altgrad"
        and (floor := name.split(".")[1:2])
        and floor[0] in FLOORS
        and FLOORS.index(floor[0]) > floor_of(path)
    ]
    assert not upward


def test_imports_make_no_circle():
    """Counting those inside functions, and those for types only."""
    modules = {}
    for path in SOURCES:
        parts = ("altgrad", *path.relative_to(PACKAGE).with_suffix("").parts)
        modules[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in modules.items():
        found = {target for item in imported(path) for target in (item, item.rpartition(".")[0]) if target in modules}
        # A package stands for itself only where a name of its own is taken from it.
        graph[name] = {one for one in found - {name} if not any(other.startswith(f"{one}.") for other in found)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_the_sweep_floor_imports_ray():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in SOURCES
        if any(name.split(".")[0] == "ray" for name in imported(path))
    }
    assert users <= {"sweep"}


def test_analysis_imports_no_training_loop():
    for path in SOURCES:
        if path.relative_to(PACKAGE).parts[0] == "analysis":
            assert not any(name.startswith("altgrad.training.trainer") for name in imported(path)), path


@pytest.mark.parametrize("command", ["status", "why"])
def test_a_ledger_is_read_without_what_trains(command: str, tmp_path: Path):
    spec = SweepSpec(formats=("E5M2",), optimizers=("grid",), seeds=1)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials(spec.trials("a" * 64), "a" * 64)
    code = (
        f"import sys; from altgrad.cli import main; code = main([{command!r}, {str(tmp_path)!r}])\n"
        f"print(code, [m for m in {(*HEAVY, 'torch', 'pandas', 'scipy', 'numba', 'numpy')!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_every_command_has_its_function():
    for words in (["plan"], ["run"], ["submit"]):
        commands = next(action.choices for action in cli._parser(words)._actions if action.choices)
        for parser in commands.values():
            assert callable(cli.handler_of(parser.get_default("handler")))


@pytest.mark.parametrize("package", [altgrad.training, altgrad.sweep])
def test_every_name_of_a_lazy_package_is_there(package: ModuleType):
    assert all(
        getattr(package, name).__module__.startswith(package.__name__) for name in package.__all__ if not name.isupper()
    )
    assert all(hasattr(package, name) for name in package.__all__)
    assert not hasattr(package, "Tranier")


@pytest.mark.parametrize("module", ["", ".quantization", ".training", ".sweep", ".cli"])
def test_importing_is_light(module: str):
    code = f"import sys, altgrad{module}; print([m for m in {HEAVY + COMPILERS!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_lower_floors_run_without_ray_and_without_numba():
    code = (
        "import sys; sys.modules['ray'] = None; sys.modules['numba'] = None\n"
        "from altgrad.training import Trainer, TrainConfig\n"
        "config = TrainConfig(steps=2, log_interval=1, eval_interval=2, checkpoint_interval=2,"
        " model={'layers': 1, 'heads': 1, 'width': 16, 'block': 16},"
        " data={'batch': 2, 'eval_batches': 1}, optimizer={'kind': 'grid'}, format='E3M4')\n"
        "print(Trainer(config).run().kind)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr


def test_every_module_says_why_it_exists_and_stays_short():
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    assert not [path for path, text in texts.items() if not ast.get_docstring(ast.parse(text))], "no docstring"
    assert not [path for path, text in texts.items() if text.count("\n") > 400], "too long"


def test_no_test_is_too_long_to_read():
    long = {path.name for path in PACKAGE.parent.glob("tests/**/*.py") if path.read_text().count("\n") > 400}
    assert not long


def test_every_tensor_that_is_made_states_its_dtype():
    """Nothing may depend on torch's default dtype, which belongs to the program around."""
    makers = {"zeros", "ones", "empty", "full", "tensor", "rand", "randn", "eye", "linspace", "hann_window"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in makers:
                is_torchs = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                assert not is_torchs or "dtype" in {k.arg for k in node.keywords}, f"{path.name}:{node.lineno}"
