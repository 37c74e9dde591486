"""What ends a cluster that nobody needs: run beside Ray on every node.

* On a worker, the dead man's switch: when the head has not answered for a while, nothing in Ray would ever stop this
  pod, so it deletes itself, with the key that RunPod gives each pod for itself (else by `runpodctl`, which has it too).
  So it does where `node_check` found a GPU that doesn't work: Ray would set it up twice more, for a minute and a half
  at the price of a GPU.
* On the head: when no worker is left and no job has run for a while, the head deletes itself. What matters lies on the
  network volume. When `max_cost_total` is spent the workers are deleted, whatever they do; trials wait in the ledger.

A worker that RunPod does not delete is tried again and again, and keeps neither the others nor, for ever, the head: the
head has the only key that may delete it, so it tries for half an hour more, and then goes itself. A worker that still
runs then misses its head and asks for its own deletion.

Nothing ends a watch but its work: whatever a look raises is logged, and the next look comes.
`python -m altgrad_cluster.watch worker HEAD_IP SECONDS API_BASE` and `… watch head`; each takes the place of an earlier
one of its kind, and writes to ~/.altgrad/watch.log. `start_command` deletes a pod on which none runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from altgrad_cluster import keys, node
from altgrad_cluster.api import Api, Pod, open_without_redirect
from altgrad_cluster.errors import ApiError
from altgrad_cluster.naming import KIND, PodName, fingerprint, fixed_tags
from altgrad_cluster.registry import LockedFile, cluster_folder, home
from altgrad_cluster.settings import Settings
from altgrad_cluster.spending import Purse

GCS_PORT = 6379
JOBS = "http://127.0.0.1:8265/api/jobs/"
INTERVAL_S = 5.0
LOOK_S = 30.0
"""Between two looks of the head at the account: each costs a request of a small quota."""
LAST_TRIES_S = 1800.0
"""For so long the head stays up to delete workers that RunPod would not delete."""
HOPELESS = "hopeless"
"""file in this node's records: why no further set-up would help"""
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
DELETE_COMMANDS = (("pod", "delete"), ("remove", "pod"))
"""of runpodctl, newer and older"""


class Deadline:
    """Expires when nothing was seen alive for `patience` seconds."""

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._clock = clock
        self._last = clock()

    def seen(self) -> None:
        self._last = self._clock()

    @property
    def is_over(self) -> bool:
        return self._clock() - self._last >= self._patience


def answers(host: str, port: int = GCS_PORT, timeout: float = 3.0) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError:
        return False
    return True


def watch_head_from_worker(head_ip: str, patience: float, base: str) -> None:
    """Returns once this pod has asked for its own deletion."""
    deadline, why = Deadline(patience), ""
    hopeless = home() / HOPELESS
    while not why:
        with logged():
            if answers(head_ip):
                deadline.seen()
            if hopeless.exists():
                why = hopeless.read_text(encoding="utf-8")
        if deadline.is_over:
            why = f"the head at {head_ip} has not answered for {patience:.0f} s"
        if not why:
            time.sleep(min(INTERVAL_S, patience / 4))
    say(f"{why}: this pod deletes itself")
    while True:
        with logged():
            if delete_this_pod(base):
                return
        time.sleep(INTERVAL_S)


def delete_this_pod(base: str) -> bool:
    """Whether RunPod took the request, by its API or by its command line tool."""
    own, pod_id = node.environment().get("RUNPOD_API_KEY", ""), node.pod_id()
    try:
        Api(lambda: own, base).delete_pod(pod_id)
        return True
    except ApiError as error:
        say(str(error))
    for command in DELETE_COMMANDS:
        try:
            subprocess.run(["runpodctl", *command, pod_id], check=True, capture_output=True, timeout=60)
            return True
        except (OSError, subprocess.SubprocessError) as error:
            say(f"runpodctl: {error}")
    return False


class HeadWatch:
    """One look at a time at the whole cluster, from its head.

    `unwilling` names the pods that the provider could not delete: nobody needs them, so the head doesn't stay for them.
    `leave` deletes the head by the pod's own means, where the API hears the cluster's key no more; its workers, which
    no head answers then, follow.
    """

    def __init__(
        self,
        config: dict[str, Any],
        api: Api,
        purse: Purse,
        *,
        busy: Callable[[], bool],
        unwilling: Callable[[], set[str]] = set,
        leave: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = config["cluster_name"]
        settings = Settings.read(config["provider"])
        self._key = fingerprint(settings.public_key)
        self._api = api
        self._purse = purse
        self._busy = busy
        self._unwilling = unwilling
        self._leave = leave
        self._clock = clock
        self._idle = Deadline(settings.head_idle_s, clock)
        self._last_tries: Deadline | None = None

    def look(self) -> bool:
        """Whether the head is needed still. Deletes workers that there is no money for."""
        try:
            pods = self._pods()
        except ApiError as error:
            say(f"the pods can't be listed: {error}")
            # Without a list none can be deleted but the head, by itself; one refusal is no reason for that.
            self._purse.count_on()
            if self._busy() and not self._purse.is_exhausted:
                self._idle.seen()
            return not self._idle.is_over
        self._purse.observe(pods)
        workers = [pod["id"] for pod in pods if not _is_head(pod)]
        if self._purse.is_exhausted:
            if workers:
                say(f"max_cost_total is spent: the workers are deleted ({', '.join(workers)})")
            self._delete(workers)
        elif set(workers) - self._unwilling() or self._busy():
            self._idle.seen()
        return not self._idle.is_over

    def delete_all(self) -> bool:
        """Deletes the workers and then the head; whether all is gone. The head waits for its workers for a while."""
        if self._last_tries is None:
            self._last_tries = Deadline(LAST_TRIES_S, self._clock)
        try:
            pods = self._pods()
        except ApiError as error:
            say(f"the pods can't be listed: {error}")
            return self._last_tries.is_over and self._leave()
        left = self._delete([pod["id"] for pod in pods if not _is_head(pod)])
        if left and not self._last_tries.is_over:
            return False
        if left:
            say(f"left behind, for RunPod does not delete them: {', '.join(left)}")
        return not self._delete([pod["id"] for pod in pods if _is_head(pod)]) or (
            self._last_tries.is_over and self._leave()
        )

    def _delete(self, pod_ids: list[str]) -> list[str]:
        """Tries each of them; those that are not deleted."""
        left = []
        for pod_id in pod_ids:
            try:
                self._api.delete_pod(pod_id)
            except ApiError as error:
                say(f"pod {pod_id} can't be deleted now: {error}")
                left.append(pod_id)
        return left

    def _pods(self) -> list[Pod]:
        return [pod for pod in self._api.pods() if self._is_ours(pod)]

    def _is_ours(self, pod: Pod) -> bool:
        name = PodName.parse(pod.get("name", ""))
        return name is not None and (name.cluster, name.key) == (self._cluster, self._key)


def _is_head(pod: Pod) -> bool:
    return fixed_tags(pod).get(KIND) == "head"


def has_jobs() -> bool:
    """Whether a job or another driver is at work on this head's Ray; a Ray that doesn't answer has none."""
    token = Path(keys.REMOTE_TOKEN).expanduser()
    request = urllib.request.Request(JOBS)
    if token.exists():
        request.add_header("Authorization", f"Bearer {token.read_text(encoding='utf-8').strip()}")
    with logged():
        with open_without_redirect(request, timeout=10) as answer:
            jobs = json.loads(answer.read())
        return any(job.get("status") in ("PENDING", "RUNNING") for job in jobs)
    return False


def watch_cluster_from_head() -> None:
    """Returns once the head has asked for its own deletion."""
    config = json.loads(BOOTSTRAP.expanduser().read_text(encoding="utf-8"))
    settings = Settings.read(config["provider"])
    cluster = config["cluster_name"]
    api = Api(keys.mounted_api_key, settings.api_base)
    refused = LockedFile(cluster_folder(cluster) / "undeleted.json")
    watch = HeadWatch(
        config,
        api,
        settings.purse(cluster),
        busy=has_jobs,
        unwilling=lambda: set(refused.read()),
        leave=lambda: delete_this_pod(settings.api_base),
    )
    is_needed = True
    while is_needed:
        time.sleep(min(LOOK_S, settings.head_idle_s / 4))
        with logged():
            is_needed = watch.look()
    say(f"nothing has run for {settings.head_idle_s:.0f} s: this cluster deletes itself")
    while True:
        with logged():
            if watch.delete_all():
                return
        time.sleep(LOOK_S)


@contextlib.contextmanager
def logged() -> Any:
    """What goes wrong inside is said, and no more: a watch goes on."""
    try:
        yield
    except Exception as error:
        say(f"{type(error).__name__}: {' '.join(str(error).split())}")


def say(text: str) -> None:
    # A full disk takes no log, nor does every locale every letter: neither may end the watch.
    with contextlib.suppress(Exception):
        words = text.encode("ascii", "backslashreplace").decode()
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}", flush=True)


def become_daemon() -> None:
    """Leaves the shell that started it, in the place of an earlier watch."""
    folder = home()
    folder.chmod(0o700)
    pid_file = folder / "watch.pid"
    with contextlib.suppress(OSError, ValueError):
        earlier = int(pid_file.read_text(encoding="utf-8"))
        if b"altgrad_cluster.watch" in Path(f"/proc/{earlier}/cmdline").read_bytes():
            os.kill(earlier, signal.SIGTERM)
    if os.fork():
        os._exit(0)
    os.setsid()
    log = os.open(folder / "watch.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    pid_file.write_text(str(os.getpid()), encoding="utf-8")


def main(argv: list[str]) -> int:
    if argv[:1] == ["head"] and len(argv) == 1:
        become_daemon()
        watch_cluster_from_head()
        return 0
    if argv[:1] == ["worker"] and len(argv) == 4:
        (home() / HOPELESS).unlink(missing_ok=True)
        become_daemon()
        watch_head_from_worker(argv[1], float(argv[2]), argv[3])
        return 0
    print("usage: python -m altgrad_cluster.watch head | worker HEAD_IP SECONDS API_BASE", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
