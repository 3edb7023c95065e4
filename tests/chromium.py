"""Pages in a real browser, without a network: shown once, or looked at, clicked and typed into."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--hide-scrollbars", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"),
]

# What the page is asked once it is shown; ASKED is an expression of its own.
PROBE = """<script>
const refused = [];
addEventListener('securitypolicyviolation', e => refused.push(e.blockedURI));
addEventListener('load', () => { document.title = JSON.stringify({
  refused, fetched: performance.getEntriesByType('resource').map(e => e.name)
    .filter(name => !name.startsWith('data:')),
  pictures: [...document.images].map(i => i.naturalWidth),
  tables: [...document.querySelectorAll('table')].map(t => t.rows.length),
  wide: document.documentElement.scrollWidth, screen: innerWidth,
  asked: (ASKED),
}); });
</script>"""

browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def shown(page: Path, folder: Path, *flags: str) -> str:
    """What chromium prints about a page after loading it."""
    assert CHROMIUM is not None
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def probed(page: Path, folder: Path, width: int, asked: str = "null") -> dict[str, Any]:
    """What a page tells about itself on a screen of some width.

    Args:
        page: it.
        folder: for what the browser writes.
        width: of the window, in pixels.
        asked: JavaScript, evaluated after the page was loaded.
    """
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"; script-src '[^']*'", "", text, count=1)
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy = folder / "probe.html"
    probe = PROBE.replace("ASKED", asked)
    copy.write_text(text.replace("</head>", probe + "</head>"), encoding="utf-8")
    told = shown(copy, folder, "--dump-dom", f"--window-size={width},900")
    title = re.search(r"<title>(\{.*?\})</title>", told)
    assert title
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


class Window:
    """An open page, spoken to in the browser's own protocol over two pipes."""

    def __init__(self, wants: int, says: int) -> None:
        self._wants, self._says = wants, os.fdopen(says, "rb")
        self._rest = b""
        self._number = 0
        self._session: dict[str, str] = {}

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; events in between are left out."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._wants, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                more = os.read(self._says.fileno(), 1 << 20)
                assert more, "chromium has ended"
                self._rest += more
            text, _, self._rest = self._rest.partition(b"\0")
            told = json.loads(text)
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                found: dict[str, Any] = told["result"]
                return found

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Shows a page once it is loaded."""
        if not self._session:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            told = self.ask("Target.attachToTarget", targetId=target, flatten=True)
            self._session = {"sessionId": told["sessionId"]}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.as_uri())
        self.value("new Promise(done => document.readyState === 'complete' ? done()"
                   " : addEventListener('load', () => done()))")  # fmt: skip

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        told = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def click(self, selector: str, *, share: float = 0.5) -> None:
        """Presses the mouse on an element, at a share of its width."""
        box = self.value(
            f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const b = e.getBoundingClientRect();"
            f" return [b.x, b.y, b.width, b.height]; }})(document.querySelector({selector!r}))"
        )
        x, y = box[0] + share * box[2], box[1] + box[3] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.ask(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )  # fmt: skip

    def press(self, key: str) -> None:
        """Presses a key, by its name in the browser: `ArrowLeft`, `Tab`."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9, " ": 32}
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key]
            )  # fmt: skip

    def photograph(self, path: Path, *, whole: bool = False) -> None:
        """Saves what is on the screen, or the whole page, as PNG."""
        told = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(told["data"]))


@contextmanager
def opened(folder: Path) -> Iterator[Window]:
    """A browser of its own, whose profile lies in a folder."""
    assert CHROMIUM is not None
    (to_read, wants), (says, to_write) = os.pipe(), os.pipe()
    # The browser reads from 3 and writes to 4.
    pipes = f'exec 3<&{to_read} 4>&{to_write}; exec "$@"'
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        ["bash", "-c", pipes, "bash", CHROMIUM, *flags],
        pass_fds=(to_read, to_write),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    try:
        yield Window(wants, says)
    finally:
        os.close(wants)
        process.kill()
        process.wait()
