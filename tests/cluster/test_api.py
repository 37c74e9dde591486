"""Answers that are none: cut off, no HTTP, or sent elsewhere. Each is an ApiError, and none is followed or fatal."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest
from altgrad_cluster import node, watch
from altgrad_cluster.api import Api
from altgrad_cluster.errors import ApiError

KEY = "rpa_secret"
LOST = {
    "cut off in its body": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
    "cut off in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"",
    "a header without end": b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70000,
    "an impossible length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
}


class Server:
    """Answers every connection with the same bytes, and keeps what it was sent."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.requests = answer, []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = self._socket.accept()
                self.requests.append(one.recv(65536))
                one.sendall(self.answer)
                one.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@contextlib.contextmanager
def serving(answer: bytes) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()


def client(base: str, key: str = KEY, **named: object) -> Api:
    return Api(lambda: key, base, sleep=lambda seconds: None, **named)


@pytest.mark.parametrize("answer", LOST.values(), ids=LOST)
def test_an_answer_that_is_none_is_an_error_without_status(answer):
    with serving(answer) as server:
        for call in (client(server.url).pods, lambda: client(server.url).delete_pod("x")):
            with pytest.raises(ApiError) as caught:
                call()
            assert caught.value.status is None and caught.value.is_transient
        with pytest.raises(ApiError):
            client(server.url).create_pod({})
        posts = [request for request in server.requests if request.startswith(b"POST")]
        assert len(posts) == 1, "a creation is asked for once"


@pytest.mark.parametrize(
    "error",
    [
        http.client.IncompleteRead(b""),
        http.client.BadStatusLine("x"),
        ssl.SSLError(1, "handshake"),
        ValueError(f"Invalid header value b'Bearer {KEY}'"),
        UnicodeError("label too long"),
        TimeoutError("timed out"),
    ],
)
def test_whatever_the_transport_raises_is_an_error_that_quotes_no_key(error):
    def fail(request, timeout):
        raise error

    with pytest.raises(ApiError) as caught:
        client("https://api.runpod.io", transport=fail).pods()
    assert caught.value.status is None and KEY not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_not_quoted():
    with serving(b"") as server, pytest.raises(ApiError) as caught:
        client(server.url, f"{KEY}\nX: y").pods()
    assert KEY not in str(caught.value) and not server.requests


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_named_and_the_key_stays_here(status):
    with serving(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"pods":[]}') as elsewhere:
        location = f"{elsewhere.url}/v2/pods"
        text = f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
        with serving(text.encode()) as server:
            api = client(server.url)
            for call in (api.pods, lambda: api.create_pod({}), lambda: api.delete_pod("x")):
                with pytest.raises(ApiError, match=f"{status}: redirects to {location}, which is not followed"):
                    call()
        assert not elsewhere.requests


@pytest.mark.parametrize("answer", LOST.values(), ids=LOST)
def test_a_cut_off_answer_does_not_end_the_dead_mans_switch(answer, account, tmp_path, monkeypatch):
    """It asks a broken API until that is mended."""
    pod_id = account.add_pod("ag--one--00000000--worker--worker--0", status="RUNNING")
    key = next(key for key, owner in account._pod_keys.items() if owner == pod_id)
    (tmp_path / "environ").write_bytes(f"RUNPOD_POD_ID={pod_id}\0RUNPOD_API_KEY={key}\0".encode())
    monkeypatch.setattr(node.environment, "__defaults__", (tmp_path / "environ",))
    monkeypatch.setattr(watch, "INTERVAL_S", 0.01)
    monkeypatch.setattr(watch, "answers", lambda host: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    tries = []
    with serving(answer) as server:

        def api(own, base):
            tries.append(base)
            return client(account.url if len(tries) > 2 else server.url, own())

        monkeypatch.setattr(watch, "Api", api)
        watch.watch_head_from_worker("127.0.0.1", 0.02, server.url)
    assert len(tries) == 3 and pod_id not in account.pods


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), OSError(28, "full"), KeyError("id"), http.client.IncompleteRead(b"")]
)
def test_whatever_a_look_raises_the_watches_go_on(error, monkeypatch, tmp_path, capsys, account):
    monkeypatch.setattr(watch, "INTERVAL_S", 0.01)
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    looks, deletions = iter([error, error, True, False]), iter([error, False, True])

    def give(answers):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    bootstrap = tmp_path / "bootstrap.yaml"
    bootstrap.write_text('{"cluster_name": "one", "provider": {"public_key": "ssh-ed25519 AAAA"}}')
    monkeypatch.setattr(watch, "BOOTSTRAP", bootstrap)
    monkeypatch.setattr(watch.HeadWatch, "look", lambda self: give(looks))
    monkeypatch.setattr(watch.HeadWatch, "delete_all", lambda self: give(deletions))
    watch.watch_cluster_from_head()
    assert not list(looks) and not list(deletions)
    said = capsys.readouterr().out
    assert said.count(f" {type(error).__name__}: ") == 3

    heads, ends = iter([error, error, False]), iter([error, False, True])
    monkeypatch.setattr(watch.Deadline, "is_over", property(lambda self: heads.__length_hint__() == 0))
    monkeypatch.setattr(watch, "answers", lambda host: give(heads))
    monkeypatch.setattr(watch, "delete_this_pod", lambda base: give(ends))
    watch.watch_head_from_worker("127.0.0.1", 0.04, "http://x")
    assert not list(ends)
