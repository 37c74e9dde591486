"""A local server that speaks as much of W&B's protocol as its public API takes to read a project's runs.

Of a run's history the first half is a parquet file and the rest live rows, as W&B has them of a run that goes on; there
and in summaries, numbers that are not finite are words.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.local_server import serving

ENTITY = "laboratory"
WORDS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


@contextmanager
def server_of(projects: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Serves {project: runs} of ENTITY while the context lasts; yields the server's address.

    A run is a mapping of its id, group, job_type, config, metrics (rows) and summary.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            _, project, name = self.path.rsplit("/", 2)
            [run] = [run for run in projects[project] if run["id"] == name]
            self._send(_parquet(run["metrics"][: len(run["metrics"]) // 2]))

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path != "/graphql":
                return self._send(b"{}")
            asked = json.loads(sent)
            variables = asked.get("variables") or {}
            data = {"viewer": {"id": "u", "entity": ENTITY, "username": "u", "email": "", "flags": "{}", "teams": None}}
            if "viewer" not in asked["query"]:
                data = {"project": self._project(asked["query"], variables)}
            return self._send(json.dumps({"data": data}).encode())

        def _project(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any] | None:
            runs = projects.get(variables["project"]) if variables["entity"] == ENTITY else None
            if runs is None:
                return None
            if "query Runs(" in query:
                return _page(runs, variables, whole="config" in query)
            name = variables.get("name") or variables.get("runName") or variables.get("run")
            [run] = [run for run in runs if run["id"] == name]
            return {"run": self._history(query, run, variables)}

        def _history(self, query: str, run: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
            rows = run["metrics"]
            half = len(rows) // 2
            if "historyKeys" in query:
                return {"historyKeys": {"lastStep": max((row["_step"] for row in rows), default=-1)}}
            if "parquetHistory" in query:
                address = f"http://127.0.0.1:{self.server.server_address[1]}/parquet/{variables['project']}/{run['id']}"
                live = [{"_step": row["_step"]} for row in rows[half:]]
                return {"parquetHistory": {"parquetUrls": [address] if half else [], "liveData": live}}
            asked = range(variables["minStep"], variables["maxStep"])
            return {"history": [json.dumps(_words(row)) for row in rows[half:] if row["_step"] in asked]}

        def _send(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with serving(Handler) as address:
        yield address


def _page(runs: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    """The page of a project's runs that was asked for, two runs at most."""
    filters = json.loads(variables["filters"])
    if "group" in filters:
        runs = [run for run in runs if run["group"] == filters["group"]]
    first = int(variables["cursor"] or 0)
    last = min(first + min(2, variables["perPage"]), len(runs))
    edges = [{"node": _node(run, whole=whole), "cursor": str(last)} for run in runs[first:last]]
    info = {"endCursor": str(last), "hasNextPage": last < len(runs)}
    return {"internalId": "1", "runCount": len(runs), "readOnly": False, "runs": {"edges": edges, "pageInfo": info}}


def _node(run: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    empty = ("sweepName", "commit", "heartbeatAt", "description", "notes")
    node = dict.fromkeys(empty) | {
        "id": f"id-{run['id']}",
        "projectId": "1",
        "name": run["id"],
        "displayName": run["id"],
        "state": "finished",
        "group": run["group"],
        "jobType": run["job_type"],
        "createdAt": "2026-01-01T00:00:00Z",
        "tags": [],
        "readOnly": False,
        "historyLineCount": len(run["metrics"]),
        "user": {"name": "u", "username": "u"},
    }
    if whole:
        config = {name: {"value": value, "desc": None} for name, value in run["config"].items()}
        node |= {
            "config": json.dumps(config | {"_wandb": {"value": {}}}),
            "summaryMetrics": json.dumps(_words(run["summary"])),
            "systemMetrics": "{}",
            "historyKeys": {},
        }
    return node


def _words(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: WORDS.get(str(v), v) if isinstance(v, float) else v for name, v in values.items()}


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()
