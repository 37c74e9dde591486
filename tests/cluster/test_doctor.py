"""Troubles that `ray up` ends with in one line and `altgrad cluster doctor` lists, before anything is paid for."""

from __future__ import annotations

import copy
import functools
import json
import stat
from pathlib import Path

import pytest
import yaml
from altgrad_cluster import bootstrap, checks, commands, doctor, keys, node_check
from altgrad_cluster.api import Api
from altgrad_cluster.errors import ClusterError
from altgrad_cluster.provider import RunPodNodeProvider
from fake_runpod import until
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster/runpod.yaml"


ONCE = functools.cache(lambda module, code: list(checks.import_problems(module, code)))
"""Importing Ray in a process of its own takes seconds, and gives the same each time."""


@pytest.fixture
def config(monkeypatch, account):
    monkeypatch.setenv("RUNPOD_API_KEY", account.key)
    monkeypatch.setenv("RUNPOD_API_BASE", account.url)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(doctor, "import_problems", ONCE)
    return prepare_config(yaml.safe_load(FILE.read_text()))


@pytest.fixture
def api(account):
    return Api(lambda: account.key, account.url)


def complaints(config, api, on_head=None):
    return {check: lines for check, lines in doctor.diagnose(config, api, on_head) if lines}


def test_the_file_as_it_is_has_no_trouble_and_satisfies_rays_schema(config, api, account):
    assert complaints(config, api) == {}
    validate_config(copy.deepcopy(config))
    assert not account.pods


def test_bootstrap_fills_in_keys_code_and_the_volume(config, account, own_home):
    done = bootstrap.complete(copy.deepcopy(config))
    text = json.dumps(done)
    token = (own_home / "home/.ray/auth_token").read_text()
    assert account.key not in text and token not in text
    assert done["provider"]["network_volume"] == {"id": "vol0altgrad", "path": "/workspace", "data_center": "EU-RO-1"}
    assert "{" not in "".join(done["head_setup_commands"] + done["worker_setup_commands"])
    for path in (
        done["auth"]["ssh_private_key"],
        done["file_mounts"][keys.REMOTE_API_KEY],
        done["file_mounts"][keys.REMOTE_TOKEN],
    ):
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert {"~/altgrad/altgrad", "~/altgrad/cluster", "~/altgrad/sweeps"} <= set(done["file_mounts"])
    validate_config(copy.deepcopy(done))
    for_head = RunPodNodeProvider(done["provider"], "altgrad").prepare_for_head_node(done)
    assert keys.REMOTE_API_KEY not in for_head["file_mounts"] and keys.REMOTE_TOKEN in for_head["file_mounts"]
    assert keys.REMOTE_API_KEY in done["file_mounts"]


def test_two_clusters_have_two_ssh_keys(own_home):
    one, other = keys.ssh_key("one"), keys.ssh_key("other")
    assert one[1] != other[1] and keys.ssh_key("one") == one


def test_a_missing_key_is_one_line_with_what_to_do(config, monkeypatch, api):
    monkeypatch.delenv("RUNPOD_API_KEY")
    with pytest.raises(ClusterError, match=r"^RUNPOD_API_KEY: missing: export it, or put the key into .*runpod_api"):
        bootstrap.complete(copy.deepcopy(config))
    assert "missing" in complaints(config, api)["the API key"][0]
    with pytest.raises(SystemExit, match=r"^altgrad: RUNPOD_API_KEY: missing"):
        RunPodNodeProvider.bootstrap_config(copy.deepcopy(config))


def test_a_key_file_that_others_can_read_is_refused(monkeypatch, own_home):
    path = own_home / "altgrad" / "runpod_api_key"
    path.parent.mkdir()
    path.write_text("rpa_x")
    path.chmod(0o644)
    with pytest.raises(ClusterError, match="mode 0644 is not allowed"):
        keys.api_key()
    path.chmod(0o600)
    assert keys.api_key() == "rpa_x" and keys.api_key_file("one") == path


def test_a_refused_key(config, account, monkeypatch):
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_wrong")
    assert "refuses this key" in complaints(config, Api(keys.api_key, account.url))["the API key"][0]


def test_an_unequal_ray_version_and_a_provider_that_the_head_lacks(config, api, account, monkeypatch, own_home):
    (own_home / "home/.ray").mkdir(parents=True)
    lines = list(node_check.troubles("head", "2.0.0"))
    assert any("and 2.0.0 where `ray up` ran: equal versions are expected" in line for line in lines)
    monkeypatch.setitem(__import__("sys").modules, "altgrad_cluster.provider", None)
    found = next(line for line in node_check.troubles("head", "2.60.0") if "altgrad_cluster.provider" in line)
    assert "can't be imported here" in found
    pod = account.add_pod("ag--altgrad--00000000--head--head--0")
    until(lambda: account.pods[pod]["status"] == "RUNNING", 5, "the head runs")
    asked = []
    answered = complaints(config, api, lambda command: (asked.append(command), (1, f"altgrad: {found}\n"))[1])
    assert answered == {"the head: imports, Ray's version, secrets": [found]}
    assert asked[0].startswith("python3 -m altgrad_cluster.node_check head 2.")


def test_a_provider_that_needs_what_is_not_shipped(tmp_path):
    (tmp_path / "altgrad_cluster").mkdir()
    (tmp_path / "altgrad_cluster/__init__.py").write_text("")
    (tmp_path / "altgrad_cluster/provider.py").write_text("import altgrad.training")
    found = list(checks.import_problems("altgrad_cluster.provider.RunPodNodeProvider", tmp_path))
    assert len(found) == 1 and "the head could not import it from what is shipped" in found[0]
    assert not list(checks.import_problems("altgrad_cluster.provider.RunPodNodeProvider", ROOT / "cluster"))
    assert "can't be found" in next(checks.import_problems("no_such_package.provider.X", ROOT / "cluster"))


WORKER = "available_node_types.worker.node_config"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda c: c["available_node_types"]["worker"]["node_config"].update(gpus=["NVIDIA H100 80GB HBM2"]),
            f"{WORKER}.gpus: 'NVIDIA H100 80GB HBM2' is no GPU of RunPod; nearest: NVIDIA H100 80GB HBM3",
        ),
        (
            lambda c: c["available_node_types"]["worker"]["node_config"].update(data_centers=["US-KS-2"]),
            f"{WORKER}.data_centers: US-KS-2 is not allowed with the network volume vol0altgrad, which "
            "lies in EU-RO-1: a pod can mount it only there",
        ),
        (
            lambda c: c["available_node_types"]["worker"]["node_config"].update(data_centers=["EU-RO-1", "EU-RO-9"]),
            f"{WORKER}.data_centers: 'EU-RO-9' is no data centre of RunPod; nearest: EU-RO-1",
        ),
        (
            lambda c: (
                c["provider"].pop("network_volume"),
                c["available_node_types"]["worker"]["node_config"].update(data_centers=["US-OLD-1"]),
            ),
            f"{WORKER}.data_centers: 'US-OLD-1' is not allowed: pods can't reach each other there "
            "(no global networking)",
        ),
        (
            lambda c: c["provider"]["network_volume"].update(name="altgard"),
            "provider.network_volume.name: 'altgard': none in this account; there are altgrad; nearest: altgrad",
        ),
    ],
)
def test_what_only_the_account_knows(config, api, account, change, line):
    change(config)
    assert complaints(config, api) == {"GPUs, data centres and the volume": [line]}
    with pytest.raises(ClusterError) as caught:
        bootstrap.complete(copy.deepcopy(config))
    assert str(caught.value) == line and not account.pods


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda c: c["provider"].update(max_cost_per_houre=3),
            "provider.max_cost_per_houre: unknown; allowed: network_volume, max_cost_per_hour, max_cost_total",
        ),
        (
            lambda c: c["provider"].update(max_cost_total="much"),
            "provider.max_cost_total: 'much' is not allowed: a number",
        ),
        (lambda c: c["provider"].update(network_volume="altgrad"), "provider.network_volume: 'altgrad' is not allowed"),
        (lambda c: c.update(cluster_name="My Cluster"), "cluster_name: 'My Cluster' is not allowed: lower case"),
        (lambda c: c.update(cluster_name="a--b"), "cluster_name: 'a--b' is not allowed"),
        (lambda c: c.pop("rsync_filter"), "rsync_filter: missing; an external provider has no defaults"),
        (
            lambda c: c["available_node_types"]["head"].update(resources={"CPU": 4}),
            "available_node_types.head.resources: {'CPU': 4} is not allowed: trials on the head could read the API key",
        ),
        (
            lambda c: c["available_node_types"]["worker"]["node_config"].update(gpus=[]),
            f"{WORKER}.gpus: [] is not allowed",
        ),
        (lambda c: c["available_node_types"]["worker"]["node_config"].update(disk="big"), f"{WORKER}.disk: 'big' is"),
        (
            lambda c: c["available_node_types"]["worker"]["node_config"].update(env={"WANDB_API_KEY": "x"}),
            f"{WORKER}.env.WANDB_API_KEY: not allowed",
        ),
        (
            lambda c: c.update(head_start_ray_commands=["ray start --head"]),
            "head_start_ray_commands: `ray start` without",
        ),
        (lambda c: c.update(max_workers=-1), "max_workers: -1 is less than the minimum of 0"),
        (
            lambda c: c["available_node_types"]["worker"]["node_config"].update(gpu_count=8),
            "available_node_types.worker.resources.GPU: 1 is not allowed: gpu_count, 8, is what every pod is rented",
        ),
        (
            lambda c: c["available_node_types"]["worker"].update(resources={"CPU": 4}),
            "available_node_types.worker.resources.GPU: None is not allowed: gpu_count, 1, is",
        ),
        (
            lambda c: c["available_node_types"]["worker"].update(resources={"CPU": 4, "GPU": 2}),
            "available_node_types.worker.resources.GPU: 2 is not allowed: gpu_count, 1, is",
        ),
        (
            lambda c: c["available_node_types"]["head"]["node_config"].update(gpu_count=2),
            "available_node_types.head.node_config.gpu_count: 2 is not allowed: no trial runs on the head",
        ),
        *(
            (
                lambda c, image=image: c["available_node_types"]["worker"]["node_config"].update(image=image),
                f"{WORKER}.image: {image!r} is not allowed: an image with its tag",
            )
            for image in ("runpod/pytorch", "runpod/pytorch@sha256:12", "a b:c", "", 5, "x:", "x@sha256:" + "g" * 64)
        ),
        *(
            (
                lambda c, stated=stated: c["available_node_types"]["worker"]["node_config"].update(min_cuda=stated),
                f'{WORKER}.min_cuda: {stated!r} is not allowed: "major.minor" in quotes',
            )
            for stated in (12.8, "12", "12.8.1", "cu128")
        ),
        (lambda c: c["provider"].update(set_up_minutes=0), "provider.set_up_minutes: 0 is not allowed: a number above"),
        (lambda c: c["provider"].update(worker_secrets="HF_TOKEN"), "provider.worker_secrets: 'HF_TOKEN' is not allow"),
    ],
)
def test_what_the_file_alone_shows(config, api, change, line):
    change(config)
    found = complaints(config, api)["the file"]
    assert any(text.startswith(line) for text in found), found


def test_eight_gpus_that_ray_knows_of_are_allowed_and_an_image_by_its_digest(config, api):
    worker = config["available_node_types"]["worker"]
    worker["resources"]["GPU"] = worker["node_config"]["gpu_count"] = 8
    assert len(list(doctor.notes(config))) == 2
    worker["node_config"]["image"] = "runpod/pytorch@sha256:" + "0" * 64
    assert complaints(config, api) == {}
    (note,) = doctor.notes(config)
    assert note.startswith("available_node_types.head.node_config.image: runpod/pytorch:1.0.2") and "its tag" in note


def test_missing_caps_are_a_trouble_for_the_doctor_and_a_warning_of_ray_up(config, api, capsys):
    config["provider"].pop("max_cost_total")
    line = "provider.max_cost_total: missing: nothing limits what this cluster costs; 150 USD is 10 hours of that"
    assert complaints(config, api) == {"the caps on what it costs": [line]}
    bootstrap.complete(copy.deepcopy(config))
    assert capsys.readouterr().err == f"altgrad: warning: {line}\n"


def test_a_shell_without_the_token_is_told(config, api, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "RAY_AUTH_MODE" in complaints(config, api)["Ray's token"][0]


def test_a_nodes_secrets_are_checked(own_home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(node_check, "_gpus", lambda: [])
    assert any("auth_token: missing" in line for line in node_check.troubles("worker", "2.60.0"))
    keys.auth_token_file()
    keys.write_private(own_home / "home/.altgrad/runpod_api_key", "rpa_x")
    assert [line for line in node_check.troubles("worker", "2.60.0") if "auth" not in line and "key" in line] == [
        f"{own_home}/home/.altgrad/runpod_api_key: not allowed on a worker"
    ]


def test_status_and_cost(config, account, capsys):
    def said(*words):
        code = commands.main([words[0], str(FILE), *words[1:]])
        return code, capsys.readouterr().out

    account.add_pod("ag--altgrad--00000000--head--head--0", gpu={"id": "NVIDIA L4"}, status="RUNNING")
    worker = account.add_pod("ag--altgrad--00000000--worker--worker--1", gpu={"id": "NVIDIA L40S"}, status="RUNNING")
    stranger = account.add_pod("somebody", status="RUNNING")
    code, text = said("status")
    assert code == 0 and "altgrad: 2 pods, $1.25/h" in text and worker in text and stranger not in text
    code, text = said("cost")
    assert code == 0 and "now    $1.25/h of max_cost_per_hour $15.00" in text and "of max_cost_total $100.00" in text
    assert said("gc") == (0, "nothing is left over\n") and stranger in account.pods


def test_a_command_that_there_is_not(config, capsys):
    assert commands.main(["doctr", str(FILE)]) == 2
    assert capsys.readouterr().err == ("altgrad: 'doctr' is not allowed: doctor, status, cost, gc; nearest: doctor\n")
    assert commands.main(["doctor", "no/such.yaml"]) == 2
    assert capsys.readouterr().err.startswith("altgrad: no/such.yaml: can't be read")
