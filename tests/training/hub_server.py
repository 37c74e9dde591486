"""A local server that speaks as much of the hub's file protocol as loading a parquet dataset takes."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.local_server import serving

REVISION = "1234567890abcdef1234567890abcdef12345678"


@contextmanager
def hub_of(repositories: dict[str, dict[str, bytes]]):
    """Serves {repository: {path: content}} while the context lasts; yields the endpoint's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(posted=sent)

        def _answer(self, *, with_body: bool = True, posted: bytes = b"") -> None:
            path = unquote(urlsplit(self.path).path)
            name = next((name for name in repositories if f"/datasets/{name}" in path), None)
            if name is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
            files = repositories[name]
            rest = path.split(name, 1)[1].strip("/").split("/")
            if not path.startswith("/api"):
                content = files.get("/".join(rest[2:]))
                if content is None:
                    return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
                tag = hashlib.sha256(content).hexdigest()
                return self._send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": REVISION}, with_body)
            entries = [entry(path, content) for path, content in files.items()]
            if rest[0] == "tree":
                below = "/".join(rest[2:])
                found = [item for item in entries if item["path"].startswith(below)]
                folders = {"/".join(item["path"].split("/")[:-1]) for item in found} - {""}
                found += [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders]
                return self._send(200, json.dumps(found).encode(), {}, with_body)
            if rest[0] == "revision" and rest[1] == "f" * 40:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
            if rest[0] == "paths-info":
                asked = posted.decode()
                found = [item for item in entries if item["path"] in unquote(asked)]
                return self._send(200, json.dumps(found).encode(), {}, with_body)
            info = {
                "id": name,
                "sha": REVISION,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
            }
            return self._send(200, json.dumps(info).encode(), {}, with_body)

        def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    with serving(Handler) as address:
        yield address


def entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def files_below(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}
