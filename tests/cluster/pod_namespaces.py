"""Pods as network namespaces on this machine: own processes, home, /tmp, /dev/shm and addresses, and an sshd.

Each pod has two interfaces. The public one lets through only what the pod publishes, as RunPod's port mapping does; its
22 is reached at a port of this machine, through a forwarder in this process. The private one is on a bridge between the
pods that this machine has no address on. The "image" is the Python that runs the tests: its folders are mounted
read-only, and everything else of the developer (home, checkout) is hidden, so that nothing works only because the disk
is shared.

A pod starts with its `args`, else with the image's /start.sh, which does what RunPod's does: sshd for the public key,
and the container's environment, with the pod's own API key, exported by every interactive shell. As Ubuntu's, its
.bashrc returns early in any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUTSIDE = "10.78.0.1"
"""This machine, as pods see it; the simulated API and the forwarded ports are there."""
BRIDGE = "agpods0"
TMP = Path("/tmp")
SYSTEM = ("usr", "var", "opt", "etc", "srv")
OWN = {Path("/root"): "home", TMP: "tmp"}
"""Folders that each pod has for itself, by their names here; where the checkout lies is hidden as well."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START = Path("/start.sh")
IMAGE = {"PATH": f"{Path(sys.prefix) / 'bin'}:{SYSTEM_PATH}", "HOME": "/root", "ALTGRAD_STAND_IN_GPUS": "1"}
"""The image's own environment: no pod here has a GPU, and each is to look as if it had one."""
BASHRC = """case $- in
    *i*) ;;
    *) return ;;
esac
echo "Enjoy your Pod!"
"""
START_SCRIPT = """#!/bin/bash
set -e
mkdir -p ~/.ssh
echo "$PUBLIC_KEY" >> ~/.ssh/authorized_keys
ssh-keygen -q -t ed25519 -N "" -f ~/.ssh/host_key
# As a child: sshd writes its title over the environment, which is read from the first process.
$(command -v sshd) -D -e -f /dev/null -h ~/.ssh/host_key -o UsePAM=no -o PasswordAuthentication=no \\
    -o PermitRootLogin=prohibit-password -o StrictModes=no -o MaxSessions=50 -o MaxStartups=50:30:100 \\
    -o PidFile=none -o Subsystem="sftp internal-sftp" &
printenv | grep -E "^[A-Z_][A-Z0-9_]*=" | grep -v "^PUBLIC_KEY" |
    awk -F = '{ value = $0; sub(/^[^=]*=/, "", value); print "export " $1 "=\\"" value "\\"" }' > /etc/rp_environment
echo "source /etc/rp_environment" >> ~/.bashrc
sleep infinity
"""
NEEDED = ("ip", "iptables", "sshd", "rsync", "unshare", "ssh", "ssh-keygen")


@functools.cache
def why_not() -> str | None:
    """What keeps this machine from having such pods, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in NEEDED if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = "ip netns add agprobe && ip netns del agprobe && iptables -w -L -n >/dev/null && unshare -m -p -f true"
    done = subprocess.run(["bash", "-c", probe], capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()[-200:]}" if done.returncode else None


def run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


class Namespaces:
    """The backend of a FakeRunPod whose pods are real enough for Ray."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder = folder
        top = Path("/", *checkout.resolve().parts[1:2])
        # A folder of the system is needed by the pods as well.
        self._hidden = sorted({*OWN, checkout.resolve() if top.name in SYSTEM else top})
        self._hosts = folder / "hosts"
        self._numbers: dict[str, int] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._forwarders: dict[str, Forwarder] = {}
        self._wired: set[str] = set()
        self._lock = threading.Lock()
        self._made: list[Path] = []
        self.broken_gpus = 0
        """So many of the next workers have no GPU that works; `broken` are their ids."""
        self.broken: list[str] = []

    @contextlib.contextmanager
    def ready(self) -> Iterator[Namespaces]:
        """The bridge, this machine's outside address and the volume's folder exist while it lasts.

        There is one bridge and one such address: who comes second waits.
        """
        with Path("/run/altgrad-pods.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield from self._ready()

    def _ready(self) -> Iterator[Namespaces]:
        (self.folder / "volume").mkdir(parents=True)
        self._hosts.write_text(Path("/etc/hosts").read_text())
        Path("/run/sshd").mkdir(exist_ok=True)
        run("ip", "link", "del", BRIDGE, check=False)
        run("ip", "addr", "replace", f"{OUTSIDE}/32", "dev", "lo")
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        try:
            yield self
        finally:
            for pod_id in list(self._wired):
                self.stop(pod_id)
            run("ip", "link", "del", BRIDGE, check=False)
            run("ip", "addr", "del", f"{OUTSIDE}/32", "dev", "lo", check=False)
            for place in self._made:
                with contextlib.suppress(OSError):
                    place.rmdir() if place.is_dir() else place.unlink()

    def root(self, pod_id: str) -> Path:
        """Where this machine sees the pod's own files: `home`, `tmp`."""
        return self.folder / pod_id

    def namespace(self, pod_id: str) -> str:
        return f"agp{self._numbers[pod_id]}"

    def public_ip(self, pod_id: str) -> str:
        return f"10.78.{self._numbers[pod_id]}.2"

    def start(self, pod: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            number = next(n for n in range(1, 250) if n not in self._numbers.values())
            self._numbers[pod["id"]] = number
            self._wired.add(pod["id"])
        name, private = f"agp{number}", f"10.79.0.{number}"
        self._wire(name, number, private, [port.split("/")[0] for port in pod["ports"] if port.endswith("/tcp")])
        with self._lock, self._hosts.open("a") as hosts:
            # In place: the file is mounted in every pod.
            hosts.write(f"{private} {pod['id']}.runpod.internal {pod['id']}\n")
        home = self.root(pod["id"]) / "home"
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh").chmod(0o700)
        (self.root(pod["id"]) / "tmp").mkdir(mode=0o777)
        (home / ".bashrc").write_text(BASHRC)
        script = self.root(pod["id"]) / "boot.sh"
        script.write_text(self._boot_script(pod))
        environment = {**IMAGE, **pod["env"], **self._gpus(pod)}
        with (self.root(pod["id"]) / "boot.log").open("w") as log:
            process = subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    name,
                    "unshare",
                    "-m",
                    "-p",
                    "-f",
                    "-u",
                    "--mount-proc",
                    "--kill-child",
                    "bash",
                    str(script),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        forwarder = Forwarder((self._address(number), 22))
        with self._lock:
            self._processes[pod["id"]], self._forwarders[pod["id"]] = process, forwarder
        deadline = time.monotonic() + 20
        while not forwarder.is_answered() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return {"host": OUTSIDE, "port": forwarder.port, "ip": private}

    def _gpus(self, pod: dict[str, Any]) -> dict[str, str]:
        with self._lock:
            if not self.broken_gpus or "--worker--" not in pod["name"]:
                return {}
            self.broken_gpus -= 1
            self.broken.append(pod["id"])
            return {"ALTGRAD_STAND_IN_GPUS": "0"}

    def stop(self, pod_id: str) -> None:
        with self._lock:
            process, forwarder = self._processes.pop(pod_id, None), self._forwarders.pop(pod_id, None)
            wired = pod_id in self._wired
            self._wired.discard(pod_id)
        if forwarder is not None:
            forwarder.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not wired:
            return
        number = self._numbers[pod_id]
        run("ip", "link", "del", f"agv{number}", check=False)
        run("ip", "link", "del", f"agw{number}", check=False)
        run("ip", "netns", "del", f"agp{number}", check=False)

    def is_alive(self, pod_id: str) -> bool:
        with self._lock:
            process = self._processes.get(pod_id)
        return process is None or process.poll() is None

    def _address(self, number: int) -> str:
        return f"10.78.{number}.2"

    def _wire(self, name: str, number: int, private: str, published: list[str]) -> None:
        inside = ("ip", "-n", name)
        run("ip", "netns", "del", name, check=False)
        run("ip", "netns", "add", name)
        run(*inside, "link", "set", "lo", "up")
        run("ip", "link", "add", f"agv{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "addr", "add", f"10.78.{number}.1/30", "dev", f"agv{number}")
        run("ip", "link", "set", f"agv{number}", "up")
        run(*inside, "addr", "add", f"{self._address(number)}/30", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "route", "add", "default", "via", f"10.78.{number}.1")
        run("ip", "link", "add", f"agw{number}", "type", "veth", "peer", "name", "eth1", "netns", name)
        run("ip", "link", "set", f"agw{number}", "master", BRIDGE, "up")
        run(*inside, "addr", "add", f"{private}/24", "dev", "eth1")
        run(*inside, "link", "set", "eth1", "up")
        rule = ("ip", "netns", "exec", name, "iptables", "-w", "-A", "INPUT", "-i", "eth0")
        run(*rule, "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
        for port in published:
            run(*rule, "-p", "tcp", "--dport", port, "-j", "ACCEPT")
        run(*rule, "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")
        run(*rule, "-j", "DROP")

    def _boot_script(self, pod: dict[str, Any]) -> str:
        """What the container's runtime does: its own view of the disk, then the start command as its first process."""
        root = self.root(pod["id"])
        own = {hidden: root / OWN.get(hidden, f"hidden{hidden}") for hidden in self._hidden}
        lines = ["set -e", "mount --make-rprivate /", f"hostname {pod['id']}"]
        image = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
        for hidden, stead in own.items():
            lines.append(f"mkdir -p {stead}")
            for part in sorted(path for path in image if path.is_relative_to(hidden)):
                place = stead / part.relative_to(hidden)
                lines += [f"mkdir -p {place}", f"mount --bind {part} {place}", f"mount -o remount,bind,ro {place}"]
        for mount in pod["mounts"].get("network", []):
            place = Path(mount["path"])
            self._make(place)
            lines.append(f"mount --rbind {self.folder / 'volume'} {place}")
        self._make(START)
        (root / "start.sh").write_text(START_SCRIPT)
        (root / "start.sh").chmod(0o755)
        # /tmp last: what is mounted from may lie there.
        lines += [f"mount --rbind {stead} {hidden}" for hidden, stead in own.items() if hidden != TMP]
        lines += [
            f"cp -a /etc {root / 'etc'}",
            f"mount --bind {root / 'etc'} /etc",
            f"mount --bind {self._hosts} /etc/hosts",
            f"mount --bind {root / 'start.sh'} {START}",
            "mount -t tmpfs -o size=2g tmpfs /dev/shm",
            "mount -t tmpfs tmpfs /run",
            "mkdir -p /run/sshd",
            f"mount --rbind {own[TMP]} /tmp",
            "chmod 1777 /tmp",
            f"exec {shlex.join(shlex.split(pod['args']) or [str(START)])}",
        ]
        return "\n".join(lines) + "\n"

    def _make(self, place: Path) -> None:
        """A place to mount on, for as long as there are pods: a folder, or a file where it has an ending."""
        with self._lock:
            if not place.exists():
                place.touch() if place.suffix else place.mkdir()
                self._made.append(place)


class Forwarder:
    """A port of this machine that leads to an address, as RunPod maps a public port to a pod's 22."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._server = socket.create_server((OUTSIDE, 0))
        self.port = self._server.getsockname()[1]
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def is_answered(self) -> bool:
        try:
            with socket.create_connection(self._target, 1) as found:
                found.settimeout(1)
                return found.recv(4) == b"SSH-"
        except OSError:
            return False

    def close(self) -> None:
        for one in (self._server, *list(self._open)):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                try:
                    far = socket.create_connection(self._target, 3)
                    far.settimeout(None)
                except OSError:
                    near.close()
                    continue
                self._open |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
            self._open.discard(one)
