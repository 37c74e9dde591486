"""What a node does with itself before Ray starts: its shell, its packages, its keys, its GPUs."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from altgrad_cluster import bootstrap, checks, doctor, keys, node, node_check, registry, watch
from altgrad_cluster.errors import ClusterError
from altgrad_cluster.provider import RunPodNodeProvider
from conftest import PUBLIC_KEY
from pod_namespaces import BASHRC

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A node's home with the code where `ray up` mounts it."""
    folder = tmp_path / "node"
    (folder / "altgrad").mkdir(parents=True)
    (folder / "altgrad/cluster").symlink_to(CLUSTER)
    monkeypatch.setenv("HOME", str(folder))
    return folder


def in_shell(home: Path, command: str, **environment: str) -> str:
    """As sshd runs it: a shell that is not interactive, with next to no environment."""
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={"HOME": str(home), "PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL,
    )
    return done.stdout


# Its shell


@pytest.mark.parametrize("is_set_up", [True, False])
def test_a_command_over_ssh_has_what_bashrc_sets_and_prints_nothing_else(home, is_set_up):
    """Ubuntu's .bashrc returns early in shells that are not interactive; RunPod's prints a banner."""
    lines = 'export FROM_IMAGE="a b"\n' + ". ~/altgrad/cluster/env.sh\n" * is_set_up
    (home / ".bashrc").write_text(BASHRC + lines)
    said = in_shell(home, doctor.shell('echo "$FROM_IMAGE|$RAY_AUTH_MODE|$PYTHONPATH"; echo oops >&2; exit 3'))
    assert said == f"a b|token|{home}/altgrad:{home}/altgrad/cluster\noops\n"
    assert in_shell(home, ". ~/.bashrc; echo $RAY_AUTH_MODE") == "\n", "what a plain shell would have seen"


def test_the_exit_code_of_a_command_over_ssh_is_its_own(home):
    (home / ".bashrc").write_text(BASHRC)
    done = subprocess.run(["bash", "-c", doctor.shell("exit 3")], env={"HOME": str(home), "PATH": os.environ["PATH"]})
    assert done.returncode == 3


def test_what_python_and_numba_compile_lies_where_nobody_else_can_write(home):
    names = ("PYTHONPYCACHEPREFIX", "NUMBA_CACHE_DIR")
    said = in_shell(home, f"umask 000; . ~/altgrad/cluster/env.sh; echo ${names[0]}; echo ${names[1]}").split()
    assert len(said) == 2
    for folder in (*map(Path, said), home / ".cache/altgrad"):
        assert folder.is_relative_to(home / ".cache/altgrad") and stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    (home / ".cache/altgrad").chmod(0o777)
    in_shell(home, ". ~/altgrad/cluster/env.sh")
    assert stat.S_IMODE((home / ".cache/altgrad").stat().st_mode) == 0o700
    assert "/tmp" not in (CLUSTER / "env.sh").read_text() + (CLUSTER / "altgrad_cluster/watch.py").read_text()


# Its packages


def debian() -> str | None:
    """Why this machine's own Python can't stand for Debian's, or None."""
    ask = "import sys, sysconfig, ensurepip; print(*sys.version_info[:2], sysconfig.get_path('stdlib'))"
    done = subprocess.run(["/usr/bin/python3", "-c", ask], capture_output=True, text=True)
    *version, library = done.stdout.split() or ["none"]
    if version != list(map(str, sys.version_info[:2])):
        return "/usr/bin/python3 is none, or another version than runs the tests"
    return None if Path(library, "EXTERNALLY-MANAGED").exists() else "/usr/bin/python3 is not externally managed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "image", ["venv", pytest.param("debian", marks=pytest.mark.skipif(bool(debian()), reason=str(debian())))]
)
def test_what_an_image_lacks_goes_into_an_environment_that_sees_the_image(home, tmp_path, image):
    """With a package that only a local folder has, so that pip needs no network; all else is the image's already.

    The image's Python is one that lives in a virtual environment, or Debian's, where pip refuses to install.
    """
    part, project = tmp_path / "parts", home / "altgrad/pyproject.toml"
    part.mkdir()
    _wheel(part / "altgrad_missing_part-1.0-py3-none-any.whl", "altgrad_missing_part", "1.0")
    text = (ROOT / "pyproject.toml").read_text()
    (home / "altgrad/cluster").unlink()
    shutil.copytree(CLUSTER, home / "altgrad/cluster", ignore=shutil.ignore_patterns("__pycache__"))
    project.write_text(text.replace("dependencies = [", 'dependencies = [\n    "altgrad-missing-part>=1",', 1))
    (home / ".bashrc").write_text(f". ~/altgrad/cluster/env.sh\n{BASHRC}source /etc/rp_environment\n")
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(part),
        "PIP_CONFIG_FILE": os.devnull,
    }
    if image == "debian":
        environment |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": site.getsitepackages()[0]}
        refused = ["/usr/bin/python3", "-m", "pip", "install", "altgrad-missing-part"]
        assert "externally-managed" in subprocess.run(refused, capture_output=True, text=True, env=environment).stderr
    script = ["bash", str(home / "altgrad/cluster/setup_node.sh"), "software", ray.__version__]
    for _ in range(2):
        done = subprocess.run(script, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    ours = [line for line in (home / ".bashrc").read_text().splitlines() if "env.sh" in line]
    assert ours == [". ~/altgrad/cluster/env.sh"] and (home / ".bashrc").read_text().endswith("env.sh\n")
    ask = "import altgrad_missing_part, torch, ray, sys; print(sys.prefix, torch.__file__)"
    command = f". ~/altgrad/cluster/env.sh; python3 -c '{ask}'; head -2 $(command -v ray) $(command -v altgrad)"
    first, *rest = in_shell(home, command, **environment).splitlines()
    prefix, torch_file = first.split()
    assert prefix == str(home / "altgrad-venv") and torch_file.startswith(sys.prefix), "torch is the image's own"
    starts = [line for line in rest if f"{home}/altgrad-venv/bin/python" in line]
    assert len(starts) == 2, "`ray start` and `altgrad` run the same Python"


def test_an_image_that_has_everything_is_left_as_it_is(home):
    for shipped in ("pyproject.toml",):
        (home / "altgrad" / shipped).symlink_to(ROOT / shipped)
    environment = {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PIP_NO_INDEX": "1"}
    script = ["bash", str(CLUSTER / "setup_node.sh"), "software", ray.__version__]
    assert subprocess.run(script, env=environment).returncode == 0
    assert not (home / "altgrad-venv").exists()


@pytest.mark.parametrize("module", ["watch", "node", "node_check", "start_command"])
def test_what_runs_before_anything_is_installed_needs_the_standard_library_only(module):
    """-S hides all installed packages, Ray's among them."""
    words = [sys.executable, "-S", "-c", f"import altgrad_cluster.{module}"]
    done = subprocess.run(words, env={"PYTHONPATH": str(CLUSTER)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch, tmp_path):
    found = {"torch": "2.8.0+cu128", "ray": ray.__version__}
    real = node_check.metadata.version

    def version(name: str) -> str:
        if name == "optuna":
            raise node_check.metadata.PackageNotFoundError(name)
        return found.get(name) or real(name)

    assert list(node_check.troubles("software", ray.__version__)) == []
    monkeypatch.setattr(node_check.metadata, "version", version)
    lines = list(node_check.troubles("software", ray.__version__))
    assert len(lines) == 2 and re.match(r"torch: 2\.8\.0\+cu128 in .*; .*>=2\.9.* is expected", lines[0])
    assert lines[1].startswith("optuna: missing in ")


def _wheel(path: Path, name: str, version: str) -> None:
    import zipfile

    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_the_image_holds_what_pyproject_and_ray_up_expect():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert {"pyproject.toml", "altgrad", "cluster", "README.md", "LICENSE"} == set(copied)
    assert all((ROOT / source).exists() for source in copied)
    types = yaml.safe_load((CLUSTER / "runpod.yaml").read_text())["available_node_types"]
    (base,) = [line.removeprefix("FROM ") for line in lines if line.startswith("FROM ")]
    assert {base} == {node["node_config"]["image"] for node in types.values()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (install,) = [line for line in lines if "pip install" in line]
    wanted = next(text for text in project["dependencies"] if text.startswith("ray["))
    assert f'"{wanted.split(">=")[0]}=={ray.__version__}"' in install
    (extra,) = re.findall(r'"/opt/altgrad\[(\w+)\]"', install)
    assert extra in project["optional-dependencies"]
    assert any(f"altgrad:{project['version']} " in line for line in lines)
    (torch,) = re.findall(r"torch(\d)(\d+)-", base)
    from packaging.requirements import Requirement

    pin = next(Requirement(text) for text in project["dependencies"] if text.startswith("torch"))
    assert pin.specifier.contains(f"{torch[0]}.{torch[1][:-1]}.{torch[1][-1]}"), "workers would install gigabytes"


# Its keys


def test_the_head_reads_the_mounted_key_and_never_the_environment(account, home, monkeypatch):
    monkeypatch.setenv(keys.API_KEY_VARIABLE, "podkey_of_the_pod_itself")
    config = {"api_base": account.url, "public_key": PUBLIC_KEY, "on_head": True}
    with pytest.raises(ClusterError, match=r"\.altgrad/runpod_api_key: missing: `ray up` mounts"):
        RunPodNodeProvider(config, "one").non_terminated_nodes({})
    keys.write_private(home / ".altgrad/runpod_api_key", account.key)
    assert RunPodNodeProvider(config, "one").non_terminated_nodes({}) == []
    with pytest.raises(SystemExit, match="refuses this key"):
        RunPodNodeProvider({**config, "on_head": False}, "one").non_terminated_nodes({})


@pytest.mark.parametrize(
    ("mounted", "line"),
    [
        ("right", None),
        ("podkey", "the head can't list the account's pods with it (RunPod GET /v2/pods: 403: this key is for one pod"),
        ("wrong", "the head can't list the account's pods with it (RUNPOD_API_KEY: RunPod refuses this key (401)"),
        (None, "the head can't list the account's pods with it ("),
    ],
)
def test_the_heads_check_lists_the_account_before_ray_starts(account, home, monkeypatch, mounted, line):
    account.add_pod("ag--one--00000000--head--head--0", status="RUNNING")
    known = {"right": account.key, "podkey": next(iter(account._pod_keys)), "wrong": "rpa_wrong"}
    if mounted:
        keys.write_private(home / ".altgrad/runpod_api_key", known[mounted])
    monkeypatch.setenv(keys.API_KEY_VARIABLE, account.key if mounted != "right" else "podkey_x")
    (home / "ray_bootstrap_config.yaml").write_text(json.dumps({"provider": {"api_base": account.url}}))
    found = [text for text in node_check.troubles("head", ray.__version__) if "list the account" in text]
    assert len(found) == (line is not None) and all(
        text.startswith(f"~/.altgrad/runpod_api_key: {line}") for text in found
    )


@pytest.mark.parametrize(
    ("text", "mode", "line"),
    [
        ("HF_TOKEN=hf x\n", 0o600, "line 1 is not allowed: NAME=value is expected"),
        ("# a\n\nHF_TOKEN=$(id)\n", 0o600, "line 3 is not allowed"),
        ('HF_TOKEN="x"\n', 0o600, "line 1 is not allowed"),
        ("HF_TOKEN=a;id\n", 0o600, "line 1 is not allowed"),
        ("export HF_TOKEN=x\n", 0o600, "line 1 is not allowed"),
        ("RUNPOD_API_KEY=x\n", 0o600, "line 1 is not allowed"),
        ("PATH=/x\n", 0o600, "line 1 is not allowed"),
        ("HF_TOKEN=x\n", 0o644, "mode 0644 is not allowed: others can read it"),
        ("WANDB_API_KEY=x\n", 0o600, "'HF_TOKEN': not in "),
    ],
)
def test_a_file_of_secrets_that_a_shell_could_not_read_safely_is_refused(own_home, text, mode, line):
    file = keys.write_private(own_home / "altgrad/secrets.env", text)
    file.chmod(mode)
    with pytest.raises(ClusterError) as caught:
        keys.secret_mounts("one", ["HF_TOKEN"])
    assert line in str(caught.value) and "\n" not in str(caught.value) and "$(id)" not in str(caught.value)


@pytest.mark.parametrize("for_workers", [[], ["HF_TOKEN"]])
def test_secrets_go_to_the_head_and_to_workers_where_they_are_named(own_home, home, for_workers):
    keys.write_private(own_home / "altgrad/secrets.env", "# mine\nWANDB_API_KEY=wandb/x+1=\nHF_TOKEN=hf_x\n")
    mounts = keys.secret_mounts("one", for_workers)
    assert set(mounts) == {keys.REMOTE_SECRETS, *[keys.REMOTE_WORKER_SECRETS] * bool(for_workers)}
    # Ray gives the head's copy the places there.
    there = {remote: remote for remote in (*mounts, keys.REMOTE_API_KEY, "~/x")}
    on_worker = bootstrap.for_head({"file_mounts": there, "provider": {}})["file_mounts"]
    assert on_worker == {"~/x": "~/x", **dict([(keys.REMOTE_SECRETS, keys.REMOTE_WORKER_SECRETS)] * len(for_workers))}
    for place, expected in ((keys.REMOTE_SECRETS, "wandb/x+1=|hf_x"), (keys.REMOTE_WORKER_SECRETS, "|hf_x")):
        if place not in mounts:
            continue
        assert stat.S_IMODE(Path(mounts[place]).stat().st_mode) == 0o600
        (home / ".altgrad").mkdir(exist_ok=True)
        shutil.copy(mounts[place], home / ".altgrad/secrets.env")
        command = ". ~/altgrad/cluster/env.sh; bash -c 'echo \"$WANDB_API_KEY|$HF_TOKEN\"'"
        assert in_shell(home, command).strip() == expected


def test_without_a_file_of_secrets_nothing_is_mounted(own_home):
    assert keys.secret_mounts("one", []) == {}


# Its GPUs


@pytest.mark.parametrize(
    ("rented", "stand_in", "line"),
    [
        (1, "1", None),
        (8, "8", None),
        (1, "0", "GPU self-test: 1 GPU asked for, none usable on"),
        (8, "7", "GPU self-test: 8 GPUs are expected, torch sees 7"),
        (1, "many", "GPU self-test: ValueError: ALTGRAD_STAND_IN_GPUS: 'many' is not allowed"),
        (None, "0", "GPU self-test: 1 GPU asked for, none usable on"),
    ],
)
def test_a_worker_tests_the_gpus_it_was_rented_with(tmp_path, monkeypatch, rented, stand_in, line):
    text = f"ALTGRAD_GPU_COUNT={rented}\0" if rented else "A=b\0"
    (tmp_path / "environ").write_text(text)
    monkeypatch.setattr(node.environment, "__defaults__", (tmp_path / "environ",))
    monkeypatch.setenv("ALTGRAD_STAND_IN_GPUS", stand_in)
    reason = registry.home() / watch.HOPELESS
    found = {
        kind: [text for text in node_check.troubles(kind, ray.__version__) if "GPU" in text]
        for kind in ("worker", "head", "machine")
    }
    assert not found["head"] and not found["machine"]
    assert len(found["worker"]) == (line is not None) and all(text.startswith(line) for text in found["worker"])
    assert reason.exists() == (line is not None) and (not line or reason.read_text() == found["worker"][0])


def test_setup_checks_the_gpus_before_ray_starts():
    config = yaml.safe_load((CLUSTER / "runpod.yaml").read_text())
    watch, set_up = config["worker_setup_commands"]
    assert "altgrad_cluster.watch worker" in watch and "setup_node.sh worker {ray_version}" in set_up
    watch, set_up = config["head_setup_commands"]
    assert "altgrad_cluster.watch head" in watch and "setup_node.sh head {ray_version}" in set_up
    assert not list(checks.file_problems(config | {"cluster_name": "x"}))
