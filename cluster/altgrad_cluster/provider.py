"""The node provider that `ray up` and both of Ray's autoscalers talk to.

A pod is a node. Which pods are ours, and what never changes about them, stands in their names and environment; what
changes (set up or not, with which files) stands in a file on this machine. Listings are cached for a second or two, so
that the many questions of one round of the autoscaler cost one request. Pods that stopped by themselves (interrupted,
crashed) still bill their disk: whoever lists them deletes them, and the autoscaler starts others.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import STATUS_UP_TO_DATE, STATUS_UPDATE_FAILED, TAG_RAY_NODE_STATUS

from altgrad_cluster import bootstrap, keys, reasons
from altgrad_cluster.api import Api, Pod
from altgrad_cluster.errors import ApiError, ClusterError
from altgrad_cluster.launcher import Launcher, describe
from altgrad_cluster.naming import KIND, TYPE, PodName, fingerprint, fixed_tags
from altgrad_cluster.registry import LockedFile, cluster_folder
from altgrad_cluster.settings import NodeConfig, Settings

logger = logging.getLogger(__name__)
FRESH_S = 1.5
LIVE = ("PROVISIONING", "STARTING", "RUNNING")
STOPPED = ("EXITED", "ERROR")
MOST_AT_ONCE = 20


class RunPodNodeProvider(NodeProvider):
    """RunPod pods as Ray nodes; safe to use from several threads."""

    def __init__(
        self,
        provider_config: dict[str, Any],
        cluster_name: str,
        *,
        api: Api | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(provider_config, cluster_name)
        reasons.show_in_status()
        with self._readable():
            self._settings = Settings.read(self._completed(provider_config, cluster_name))
            self._key = fingerprint(self._settings.public_key)
            folder = cluster_folder(cluster_name)
            self._tags = LockedFile(folder / "tags.json")
            self._undeleted = LockedFile(folder / "undeleted.json")
            key = keys.mounted_api_key if self._settings.on_head else keys.api_key
            self._api = api or Api(key, self._settings.api_base)
            self._purse = self._settings.purse(cluster_name)
            self._launcher = Launcher(
                self._api,
                self._settings,
                self._purse,
                LockedFile(folder / "doubts.json"),
                LockedFile(folder / "refusals.json"),
                pods=lambda: list(self._pods(fresh=True).values()),
            )
        self._clock = clock
        self._lock = threading.Lock()
        self._listing = threading.Lock()
        self._seen: tuple[float, dict[str, Pod]] = (float("-inf"), {})
        self._new: dict[str, Pod] = {}
        self._gone: set[str] = set()
        self._hopeless: dict[str, str] = {}

    # What Ray asks about nodes

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        with self._readable():
            pods = self._pods()
        return [
            pod_id
            for pod_id, pod in pods.items()
            if pod["status"] in LIVE and tag_filters.items() <= self._all_tags(pod_id, pod).items()
        ]

    def nodes_for_teardown(self, tag_filters: Mapping[str, str]) -> list[str]:
        """Those that stopped as well: they still cost."""
        with self._readable():
            pods = self._pods(fresh=True)
        return [pod_id for pod_id, pod in pods.items() if tag_filters.items() <= self._all_tags(pod_id, pod).items()]

    def is_running(self, node_id: str) -> bool:
        pod = self._pod(node_id)
        return pod is not None and pod["status"] == "RUNNING" and self._private_ip(pod) is not None

    def is_terminated(self, node_id: str) -> bool:
        pod = self._pod(node_id)
        return pod is None or pod["status"] not in LIVE or node_id in self._hopeless

    def node_tags(self, node_id: str) -> dict[str, str]:
        pod = self._pod(node_id)
        return self._all_tags(node_id, pod) if pod is not None else dict(self._tags.read().get(node_id, {}))

    def external_ip(self, node_id: str) -> str | None:
        endpoint = self._endpoint(node_id)
        return None if endpoint is None else str(endpoint["host"])

    def internal_ip(self, node_id: str) -> str | None:
        pod = self._pod(node_id)
        return None if pod is None else self._private_ip(pod)

    def ssh_port(self, node_id: str, is_inside: bool) -> int:
        """22 between pods; from outside the port that RunPod maps to it."""
        endpoint = None if is_inside else self._endpoint(node_id)
        return 22 if endpoint is None else int(endpoint["port"])

    # What Ray does to nodes

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Creates pods and returns while they are being provisioned. NodeLaunchException says why one could not be."""
        created = {}
        with self._readable(launching=True):
            config = NodeConfig.read(node_config)
            kind, node_type = tags.get(KIND, "worker"), tags.get(TYPE, "worker")
            if kind == "head":
                self._prepare_for_head()
            for _ in range(min(count, MOST_AT_ONCE)):
                name = PodName.fresh(self.cluster_name, self._key, kind, node_type)
                pod = self._launcher.launch(config, name, {**tags, KIND: kind, TYPE: node_type})
                with self._lock:
                    self._new[pod["id"]] = pod
                self.set_node_tags(pod["id"], tags)
                created[pod["id"]] = describe(pod)
        return created

    def set_node_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        def edit(content: dict[str, Any]) -> None:
            content.setdefault(node_id, {}).update(tags)

        # A pod without a record counts as up to date; one that is paid for and given up would be bought again.
        _record(self._tags, edit)
        if tags.get(TAG_RAY_NODE_STATUS) == STATUS_UPDATE_FAILED:
            self._avoid(node_id)

    def terminate_node(self, node_id: str) -> dict[str, Any] | None:
        with self._readable():
            self._delete(node_id)
        return None

    def terminate_nodes(self, node_ids: list[str]) -> dict[str, Any] | None:
        """Deletes all of them, and only then complains about those that could not be."""
        failures = self._delete_all(node_ids)
        if failures:
            with self._readable():
                raise ClusterError(
                    f"pods {', '.join(failures)} could not be deleted, all others were "
                    f"({next(iter(failures.values()))}); `altgrad cluster gc` lists what is left"
                )
        return None

    def give_up(self, node_id: str, reason: str) -> None:
        """Marks a pod as one that no waiting helps."""
        logger.error("%s", reason)
        with self._lock:
            self._hopeless[node_id] = reason

    # What Ray asks about the cluster

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        with reasons.ending_in_one_line():
            return bootstrap.complete(cluster_config)

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        return bootstrap.for_head(cluster_config)

    def get_command_runner(
        self,
        log_prefix: str,
        node_id: str,
        auth_config: dict[str, Any],
        cluster_name: str,
        process_runner: ModuleType,
        use_internal_ip: bool,
        docker_config: dict[str, Any] | None = None,
    ) -> CommandRunnerInterface:
        from altgrad_cluster.ssh import PodSSH

        return PodSSH(
            log_prefix=log_prefix,
            node_id=node_id,
            provider=self,
            auth_config=auth_config,
            cluster_name=cluster_name,
            process_runner=process_runner,
            use_internal_ip=use_internal_ip,
        )

    # How it knows

    def _completed(self, provider_config: dict[str, Any], cluster: str) -> dict[str, Any]:
        """`ray get-head-ip` and others come with the file as it is."""
        if provider_config.get("on_head"):
            return provider_config
        public = provider_config.get("public_key") or keys.ssh_key(cluster)[1]
        return {**provider_config, "public_key": public, "api_base": bootstrap.api_base(provider_config)}

    def _pods(self, fresh: bool = False) -> dict[str, Pod]:
        """Our pods by id, from a listing that is at most a moment old."""
        asked = self._clock()
        with self._listing:
            with self._lock:
                when, seen = self._seen
            if self._clock() - when < FRESH_S and not (fresh and when < asked):
                return self._with_new(seen)
            found = {pod["id"]: pod for pod in self._own(self._api.pods())}
            with self._lock:
                self._seen = (self._clock(), found)
                for pod_id in found:
                    self._new.pop(pod_id, None)
            self._purse.observe(found.values())
            self._reap(found)
            return self._with_new(found)

    def _with_new(self, found: dict[str, Pod]) -> dict[str, Pod]:
        with self._lock:
            together = {**found, **self._new}
            return {pod_id: pod for pod_id, pod in together.items() if pod_id not in self._gone}

    def _own(self, pods: list[Pod]) -> list[Pod]:
        """Those of this cluster under this key, that are not deleted yet."""
        found = []
        for pod in pods:
            name = PodName.parse(pod.get("name", ""))
            if name and (name.cluster, name.key) == (self.cluster_name, self._key) and pod["status"] != "TERMINATED":
                found.append(pod)
        return found

    def _reap(self, found: dict[str, Pod]) -> None:
        """Deletes workers that stopped by themselves; the head's own end is left to `ray up` and `ray down`."""
        stopped = []
        for pod_id, pod in found.items():
            if pod["status"] in STOPPED and fixed_tags(pod).get(KIND) == "worker":
                logger.warning("pod %s stopped by itself (%s): it is deleted", pod_id, pod["status"])
                stopped.append(pod_id)
        self._delete_all(stopped)

    def _delete_all(self, pod_ids: Iterable[str]) -> dict[str, ApiError]:
        """Tries each of them; those that could not be deleted, with the reason."""
        failures = {}
        for pod_id in pod_ids:
            try:
                self._delete(pod_id)
            except ApiError as error:
                logger.warning("pod %s can't be deleted now: %s", pod_id, error)
                failures[pod_id] = error
        return failures

    def _delete(self, pod_id: str) -> None:
        try:
            self._api.delete_pod(pod_id)
        except ApiError:
            # For the watch: the head does not stay up for a pod that nobody needs.
            _record(self._undeleted, lambda content: content.setdefault(pod_id, time.time()))
            raise
        with self._lock:
            self._gone.add(pod_id)
            self._new.pop(pod_id, None)
        _record(self._undeleted, lambda content: content.pop(pod_id, None))
        _record(self._tags, lambda content: content.pop(pod_id, None))
        logger.info("deleted pod %s", pod_id)

    def _avoid(self, pod_id: str) -> None:
        """A machine whose GPU or driver fails the node's check would else be rented again at once."""
        with self._lock:
            pod = self._seen[1].get(pod_id)
        if pod is not None:
            self._launcher.avoid(pod, "set-up failed on the last pod there")

    def _prepare_for_head(self) -> None:
        """Before a new head: another one of that name under another key is someone else's; a stopped one is ours."""
        for pod in self._api.pods():
            name = PodName.parse(pod.get("name", ""))
            if name is None or (name.cluster, name.kind) != (self.cluster_name, "head"):
                continue
            if pod["status"] == "TERMINATED":
                continue
            if name.key != self._key:
                raise ClusterError(
                    f"cluster_name: {self.cluster_name!r} is in use in this account with another SSH "
                    f"key (pod {pod['id']}): take another name, or that cluster's key"
                )
            if pod["status"] in STOPPED:
                self._delete(pod["id"])

    def _pod(self, node_id: str) -> Pod | None:
        with self._readable():
            return self._pods().get(node_id)

    def _all_tags(self, node_id: str, pod: Pod) -> dict[str, str]:
        recorded = self._tags.read().get(node_id)
        # Of a pod that another process set up nothing is recorded here.
        default = {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE} if recorded is None and pod["status"] == "RUNNING" else {}
        return {**fixed_tags(pod), **default, **(recorded or {})}

    def _private_ip(self, pod: Pod) -> str | None:
        return (pod.get("globalNetworking") or {}).get("ip")

    def _endpoint(self, node_id: str) -> dict[str, Any] | None:
        pod = self._pod(node_id)
        return None if pod is None else (pod.get("ssh") or {}).get("direct")

    def _readable(self, launching: bool = False) -> reasons.Readable:
        on_head = bool(self.provider_config.get("on_head"))
        return reasons.Readable(on_head=on_head, launching=NodeLaunchException if launching else None)


def _record(file: LockedFile, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Takes note, where the disk has room; what was done at RunPod is done all the same."""
    with contextlib.suppress(OSError):
        file.change(edit)
