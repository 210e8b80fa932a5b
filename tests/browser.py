"""A page in headless Chromium, driven over pipes by its DevTools protocol: what it logs, asks for and shows.

python tests/browser.py out/report.html picture.png --width=1280 --height=900 [--dark]
"""

import argparse
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
READY = "window.Bokeh?.documents[0]?.is_idle ?? false"


class Page:
    """errors: what went wrong in it; requests: the addresses that it asked for, its own first."""

    def __init__(self, send):
        self.errors, self.requests, self._send = [], [], send

    def evaluate(self, expression):
        """The value of an expression of JavaScript, promises awaited."""
        options = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self._send("Runtime.evaluate", options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression, seconds=120):
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"{expression} did not come true; {self.errors}"
            time.sleep(0.1)

    def show(self, width, height, dark=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._send("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", {"features": [scheme]})
        time.sleep(1.0)  # to draw

    def screenshot(self, path, whole=False):
        """Write a PNG of what is shown, or of the whole page."""
        picture = self._send("Page.captureScreenshot", {"captureBeyondViewport": whole})
        Path(path).write_bytes(base64.b64decode(picture["data"]))

    def _note(self, event):
        kind, told = event["method"], event["params"]
        if kind == "Runtime.exceptionThrown":
            self.errors.append(told["exceptionDetails"])
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append([value.get("value") for value in told["args"]])
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif kind == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
            self.requests.append(told["request"]["url"])


@contextlib.contextmanager
def page_at(address):
    """The Page of an address, once its charts are drawn."""
    to_read, to_write = os.pipe(), os.pipe()  # Chromium reads descriptor 3 and writes 4
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        child = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read[0]} 4>&{to_write[1]}', "bash", *command],
            pass_fds=(to_read[0], to_write[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read[0])
        os.close(to_write[1])
        out, answers = os.fdopen(to_read[1], "wb", buffering=0), os.fdopen(to_write[0], "rb")
        session, count = {}, 0
        page = None

        def send(method, params=None):
            nonlocal count
            count += 1
            out.write(json.dumps({"id": count, "method": method, "params": params or {}, **session}).encode() + b"\0")
            while True:
                message = b""
                while not message.endswith(b"\0"):
                    byte = answers.read(1)
                    assert byte, "Chromium ended"
                    message += byte
                message = json.loads(message[:-1])
                if "method" in message:
                    page._note(message)
                elif message["id"] == count:
                    assert "error" not in message, message["error"]
                    return message["result"]

        page = Page(send)
        try:
            target = send("Target.getTargets")["targetInfos"][0]["targetId"]
            session["sessionId"] = send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                send(f"{domain}.enable")
            send("Page.navigate", {"url": address})
            page.wait_for(READY)
            yield page
        finally:
            child.kill()
            child.wait()
            out.close()
            answers.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page")
    parser.add_argument("picture")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--whole", action="store_true", help="all of the page, not only its first screen")
    asked = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("error: a picture of a page needs Chromium, which isn't installed: apt install chromium")
    with page_at(Path(asked.page).resolve().as_uri()) as page:
        page.show(asked.width, asked.height, asked.dark)
        page.screenshot(asked.picture, asked.whole)
        for error in page.errors:
            print(error)
