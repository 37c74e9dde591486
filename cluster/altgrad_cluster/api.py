"""RunPod's REST API v2, as far as a cluster needs it, on the standard library.

Reading and deleting can be repeated, so those calls wait out a lost connection, a 5xx and a 429. Creating cannot: the
API has no idempotency key, and an answer that got lost may have made a pod. `create_pod` therefore asks once and says
what happened; who calls looks by name before asking again.

A 429 holds back every call of the process until the time that the answer names, for the quota is one per account.

Redirects are refused: urllib would send the key along to wherever one points.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from altgrad_cluster.errors import ApiError

BASE = "https://api.runpod.io"
TIMEOUT_S = 30.0
ATTEMPTS = 4
"""of a call that can be repeated; waits of 0.5, 1 and 2 s lie between"""
PATIENCE_S = 60.0
"""Longest wait for a 429; a longer Retry-After becomes an error."""
DEFAULT_RETRY_AFTER_S = 5.0

Pod = dict[str, Any]
Transport = Callable[[urllib.request.Request, float], tuple[int, dict[str, str], bytes]]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


open_without_redirect = urllib.request.build_opener(_NoRedirect).open


def over_http(request: urllib.request.Request, timeout: float) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of one exchange; OSError or HTTPException where it was not completed."""
    try:
        with open_without_redirect(request, timeout=timeout) as answer:
            return answer.status, _lower(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _lower(error.headers), error.read()


class Api:
    """The API at `base`, under the key that `key` returns; safe to use from several threads."""

    def __init__(
        self,
        key: Callable[[], str],
        base: str = BASE,
        *,
        transport: Transport = over_http,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._key = key
        self._base = base.rstrip("/")
        self._transport = transport
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._open_again = 0.0

    def pods(self) -> list[Pod]:
        """All pods of the account. The API documents no pages; should it send a next link, it is followed."""
        return list(self._listed("/v2/pods", "pods"))

    def pod(self, pod_id: str) -> Pod | None:
        """The pod, or None where there is none of that id."""
        try:
            found: Pod = self._repeat("GET", f"/v2/pods/{pod_id}")[0]
            return found
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def create_pod(self, body: dict[str, Any]) -> Pod:
        """Asks once. A transient ApiError leaves open whether there is a pod now."""
        self._wait_until_open()
        made: Pod = self._exchange("POST", "/v2/pods", body)[0]
        return made

    def delete_pod(self, pod_id: str) -> None:
        """Deletes the pod; one that is gone already is no error."""
        try:
            self._repeat("DELETE", f"/v2/pods/{pod_id}")
        except ApiError as error:
            if error.status != 404:
                raise

    def gpus(self) -> list[dict[str, Any]]:
        """Types of GPU with id, price per hour and stock."""
        return list(self._listed("/v2/catalog/gpus?include=AVAILABILITY&product=POD", "gpus"))

    def data_centers(self) -> list[dict[str, Any]]:
        return list(self._listed("/v2/catalog/datacenters", "dataCenters"))

    def volumes(self) -> list[dict[str, Any]]:
        return list(self._listed("/v2/network-volumes", "networkVolumes"))

    def _listed(self, path: str, field: str) -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        following: str | None = path
        while following is not None and following not in seen:
            seen.add(following)
            answer, headers = self._repeat("GET", following)
            yield from answer.get(field, [])
            following = _next_page(headers, self._base + following)

    def _repeat(self, method: str, path: str) -> tuple[Any, dict[str, str]]:
        for attempt in range(ATTEMPTS):
            # One pod whose deletion is limited for an hour must not keep the others alive: each is asked for once.
            if method != "DELETE" or attempt or self._closed_for() <= PATIENCE_S:
                self._wait_until_open()
            try:
                return self._exchange(method, path)
            except ApiError as error:
                last = attempt == ATTEMPTS - 1
                if last or not (error.is_transient or error.status == 429):
                    raise
                if error.status != 429:
                    self._sleep(0.5 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _closed_for(self) -> float:
        with self._lock:
            return self._open_again - self._clock()

    def _wait_until_open(self) -> None:
        wait = self._closed_for()
        if wait > PATIENCE_S:
            raise ApiError("any call", 429, f"rate limit, open again in {wait:.0f} s", wait)
        if wait > 0:
            self._sleep(wait)

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[Any, dict[str, str]]:
        call = f"{method} {path.split('?')[0]}"
        request = urllib.request.Request(
            self._base + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {self._key()}",
                "Content-Type": "application/json",
                "Accept": "application/json",
                "User-Agent": "altgrad-cluster",
            },
        )
        try:
            status, headers, text = self._transport(request, TIMEOUT_S)
        except OSError as error:
            raise ApiError(call, None, str(getattr(error, "reason", error))) from None
        except http.client.HTTPException as error:
            raise ApiError(call, None, f"an incomplete answer ({type(error).__name__})") from None
        except ValueError as error:
            # The text of these can quote a header, and so the key.
            raise ApiError(call, None, f"not a valid exchange ({type(error).__name__})") from None
        if 300 <= status < 400:
            raise ApiError(call, status, f"redirects to {headers.get('location', 'nowhere')}, which is not followed")
        if status >= 400:
            raise self._refusal(call, status, headers, text)
        try:
            return (json.loads(text) if text else {}), headers
        except ValueError:
            raise ApiError(call, None, f"an answer that is no JSON ({text[:60]!r})") from None

    def _refusal(self, call: str, status: int, headers: dict[str, str], text: bytes) -> ApiError:
        retry_after = None
        if status == 429:
            retry_after = _seconds(headers.get("retry-after"))
            with self._lock:
                self._open_again = max(self._open_again, self._clock() + retry_after)
        return ApiError(call, status, _detail(text), retry_after)


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _next_page(headers: dict[str, str], url: str) -> str | None:
    """The path of the next page by RFC 8288, as the answer of `url` names it; None on the last.

    ApiError for another host's, to which the key would go.
    """
    found = re.search(r'<([^>]+)>\s*;\s*rel="?next"?', headers.get("link", ""))
    if found is None:
        return None
    here, there = urllib.parse.urlsplit(url), urllib.parse.urlsplit(urllib.parse.urljoin(url, found[1]))
    if (there.scheme, there.netloc) != (here.scheme, here.netloc):
        raise ApiError(f"GET {here.path}", None, f"the next page is said to be at {found[1]}, which is not followed")
    return str(urllib.parse.urlunsplit(("", "", there.path, there.query, "")))


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or DEFAULT_RETRY_AFTER_S))
    except ValueError:
        return DEFAULT_RETRY_AFTER_S


def _detail(text: bytes) -> str:
    """What a problem document (RFC 9457) says, in one line."""
    try:
        problem = json.loads(text)
        words = [str(problem.get("detail") or problem.get("title") or ""), *map(str, problem.get("errors") or ())]
        return " ".join(" ".join(filter(None, words)).split())[:400] or "no reason given"
    except (ValueError, AttributeError):
        return " ".join(text.decode(errors="replace").split())[:200] or "no reason given"
