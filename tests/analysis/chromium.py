"""A page in a headless Chromium, driven over its DevTools protocol, so that tests see what a reader sees."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


def executable() -> str | None:
    """Chromium on this machine, or None."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One page of a browser; every call waits for its answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._ids = loop, socket, itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a DevTools command; RuntimeError with its message where it fails."""
        return self._loop.run_until_complete(self._call(method, parameters))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json(timeout=60)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Shows a file at this size, CSS pixels, in the light or dark scheme, and waits until it is loaded."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 30
        while self.run("document.readyState") != "complete" or self.run("location.protocol") != "file:":
            assert time.monotonic() < deadline, f"{path} did not load in 30 s"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def printed(self, path: Path) -> None:
        """The page as printed, a PDF with the page size of its stylesheet."""
        found = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a browser of its own, which ends with the context."""
    found = executable()
    assert found is not None, "no Chromium on this machine"
    process = subprocess.Popen(
        [found, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    loop = asyncio.new_event_loop()
    try:
        port = _port(profile / "DevToolsActivePort", process)
        with contextlib.closing(loop):
            session, socket = loop.run_until_complete(_connected(port))
            yield Page(loop, socket)
            loop.run_until_complete(socket.close())
            loop.run_until_complete(session.close())
    finally:
        process.terminate()
        process.wait(20)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text(encoding="utf-8").strip()):
        assert process.poll() is None, "the browser ended"
        assert time.monotonic() < deadline, "the browser did not start in 30 s"
        time.sleep(0.05)
    return int(file.read_text(encoding="utf-8").split()[0])


async def _connected(port: int) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    session = aiohttp.ClientSession()
    async with session.get(f"http://127.0.0.1:{port}/json") as answer:
        pages = [item for item in await answer.json(content_type=None) if item["type"] == "page"]
    socket = await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
    return session, socket
