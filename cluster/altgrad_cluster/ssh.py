"""SSH to a pod: from outside through the port that RunPod maps to its 22, from the head straight to its own address.

Ray tries again for 15 minutes when a pod refuses the key. That never gets better, so a refusal that lasts marks the pod
as failed here, with its reason, and the caller ends at once.
"""

from __future__ import annotations

import subprocess
import time
from typing import Any

from ray.autoscaler._private.command_runner import SSHCommandRunner

REFUSALS = 3
PATIENCE_S = 20.0
"""A pod's sshd may run a moment before the key is in its place."""


class PodSSH(SSHCommandRunner):
    """Ray's SSH runner, aimed at a pod."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._first_refusal: float | None = None
        self._refusals = 0
        self._is_welcome = False
        self._has_rsync = False

    def run(self, cmd: str | None = None, *arguments: Any, **named: Any) -> Any:
        # With another key Ray would build fresh options, without the port; it is the same key anyway.
        named.pop("ssh_options_override_ssh_key", None)
        self._aim()
        if not self._is_welcome:
            self._knock()
        return super().run(cmd, *arguments, **named)

    def run_rsync_up(self, source: str, target: str, options: Any = None) -> None:
        if not self._has_rsync:
            self.run("command -v rsync >/dev/null || (apt-get update -qq && apt-get install -y -qq rsync >/dev/null)")
            self._has_rsync = True
        self._aim()
        super().run_rsync_up(source, target, options)

    def run_rsync_down(self, source: str, target: str, options: Any = None) -> None:
        self._aim()
        super().run_rsync_down(source, target, options)

    def remote_shell_command_str(self) -> str:
        self._aim()
        return f"ssh -o IdentitiesOnly=yes -i {self.ssh_private_key} -p {self._port} {self.ssh_user}@{self.ssh_ip}\n"

    def _aim(self) -> None:
        self._set_ssh_ip_if_required()
        self._port = self.provider.ssh_port(self.node_id, self.use_internal_ip)
        self.ssh_options.arg_dict["Port"] = self._port

    def _knock(self) -> None:
        """Finds out whether the pod takes the key. Anything else is left to the command that follows."""
        done = subprocess.run(
            [
                "ssh",
                "-o",
                "BatchMode=yes",
                "-o",
                "ControlMaster=no",
                "-o",
                "ControlPath=none",
                *self.ssh_options.to_ssh_options_list(timeout=10),
                f"{self.ssh_user}@{self.ssh_ip}",
                "true",
            ],
            # What is typed is for the command that follows.
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode == 0:
            self._is_welcome = True
        elif "Permission denied" in done.stderr:
            now = time.monotonic()
            self._first_refusal = self._first_refusal or now
            self._refusals += 1
            if self._refusals >= REFUSALS and now - self._first_refusal >= PATIENCE_S:
                self.provider.give_up(
                    self.node_id, f"pod {self.node_id} refuses the cluster's SSH key ({self.ssh_private_key})"
                )
