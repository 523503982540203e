"""A page in a headless Chromium, asked over a pipe: no driver, no port."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading
import time

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
SECONDS = 120  # for anything that is asked for; a busy machine is slow to start it


class Page:
    """A file, opened; `with` closes the browser. Its profile is in `folder`."""

    def __init__(self, path, folder, size=(1280, 900)):
        down, up = os.pipe(), os.pipe()
        # The browser reads from 3 and writes to 4; copies from 10 on are neither.
        reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (down[0], up[1]))
        window = ",".join(map(str, size))
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", f"--window-size={window}"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", *command, "about:blank"],
            pass_fds=(reads, writes),
            stderr=subprocess.DEVNULL,
        )
        for end in (down[0], up[1], reads, writes):
            os.close(end)
        self.sent, self.received = os.fdopen(down[1], "wb", 0), os.fdopen(up[0], "rb")
        self.asked, self.session = 0, None
        # Whoever waits for an answer that never comes finds the pipe closed.
        self.watch = threading.Timer(SECONDS, self.process.kill)
        self.watch.start()
        target = self.ask("Target.createTarget", url=f"file://{path}")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.wait_for("location.protocol === 'file:' && document.readyState === 'complete'")

    def ask(self, method, **parameters):
        """The answer to a command of the DevTools protocol; events in between are passed over."""
        self.asked += 1
        message = {"id": self.asked, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.sent.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self.asked:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _message(self):
        content = bytearray()
        while (byte := self.received.read(1)) != b"\0":
            assert byte, "the browser is gone"
            content += byte
        return content.decode()

    def evaluate(self, expression):
        """What a line of JavaScript comes to, as if a user had made it happen."""
        found = self.ask(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression, seconds=60):
        until = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"not within {seconds} s: {expression}"
            time.sleep(0.1)

    def click(self, selector):
        """With a mouse, in the middle of an element, wherever it is."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path=None):
        """Of the whole page, as PNG."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        content = base64.b64decode(found["data"])
        if path:
            path.write_bytes(content)
        return content

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.watch.cancel()
        self.process.kill()
        self.process.wait()
        self.sent.close()
        self.received.close()
