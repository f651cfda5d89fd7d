"""A headless Chromium without a network, spoken to over a pipe."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium")
#: Seconds that a page may take to answer.
PATIENCE = 60


class Page:
    """A tab: what it said and asked for, and what a line of JavaScript gives there."""

    def __init__(self, to, back):
        self.to, self.back, self.rest, self.ids = to, back, b"", itertools.count(1)
        self.session, self.console, self.requests = None, [], []

    def call(self, method, **params):
        """The result of a method of the DevTools protocol."""
        number = next(self.ids)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _next(self):
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            left = max(0.0, end - time.monotonic())
            assert select.select([self.back], [], [], left)[0], "chromium is silent"
            part = os.read(self.back, 1 << 20)
            assert part, "chromium has ended"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def _note(self, event):
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.consoleAPICalled":
                said = [part.get("value") for part in params["args"]]
                self.console.append((params["type"], said))
            case "Runtime.exceptionThrown":
                self.console.append(("exception", params["exceptionDetails"]))
            case "Log.entryAdded":
                self.console.append((params["entry"]["level"], params["entry"]["text"]))

    def open(self, url, width=1200, height=1400):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def run(self, script):
        """What a script comes to, awaited if it is a promise."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition):
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < end, f"never came: {condition}"
            time.sleep(0.02)

    def screenshot(self, file):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium():
    """A `Page` of a Chromium that reaches no other machine."""
    assert CHROMIUM
    to_child, to = os.pipe()
    back, from_child = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            "bash",
            "-c",
            'exec "$0" "$@" 3<&"$IN" 4>&"$OUT"',
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        pipes = {"IN": str(to_child), "OUT": str(from_child)}
        with subprocess.Popen(
            command,
            env=os.environ | pipes,
            pass_fds=(to_child, from_child),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            os.close(to_child)
            os.close(from_child)
            page = Page(to, back)
            try:
                tab = page.call("Target.createTarget", url="about:blank")
                page.session = page.call(
                    "Target.attachToTarget", targetId=tab["targetId"], flatten=True
                )["sessionId"]
                for domain in ("Page", "Runtime", "Log", "Network"):
                    page.call(f"{domain}.enable")
                yield page
                page.session = None
                page.call("Browser.close")
            finally:
                process.terminate()
                os.close(to)
                os.close(back)
