"""A visit to the server's page in a headless Chromium: for tools/check_page.py."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image

WIDTHS = (320, 768, 1024, 1440)
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
PATIENCE_MS = 120_000


@contextmanager
def serving(*options: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """The URL of a server with the reference model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "star_edge", "serve", "--port", str(port), "-t", "1", *options]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(environment or {})})
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/health")
                    break
                except OSError:
                    if server.poll() is not None:
                        log.seek(0)
                        raise SystemExit(f"the server ended: {log.read().decode()[-2000:]}") from None
                    time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            server.wait()


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio of two colours as CSS computes them: rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


class Visit:
    """One page, and what was found on it."""

    def __init__(self, browser: Any, url: str, axe: str, pictures: Path | None, width: int = 1024, **context: Any):
        self.url, self.axe, self.pictures = url, axe, pictures
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.problems: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.page.on("request", self._request)
        self.page.goto(url)
        self.page.wait_for_selector("#preset option", state="attached")

    def _console(self, message: Any) -> None:
        if (
            message.type == "error" and "Failed to load resource" not in message.text
        ):  # of the errors that are asked for
            self.problems.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.problems.append(f"something was loaded from elsewhere: {request.url[:100]}")

    def look(self, name: str) -> None:
        """axe-core's serious and critical findings, in both colour schemes."""
        if not self.page.evaluate("typeof axe === 'object'"):
            self.page.evaluate(self.axe)
        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme)
            self.page.wait_for_timeout(400)  # transitions
            run = "tags => axe.run(document, {runOnly: {type: 'tag', values: tags}})"
            found = self.page.evaluate(run, TAGS)
            print(f"  {name}, {scheme}: {len(found['passes'])} rules hold, {len(found['violations'])} do not")
            for violation in found["violations"]:
                places = "; ".join(str(node["target"]) for node in violation["nodes"][:4])
                line = f"{name}, {scheme}: {violation['impact']}: {violation['id']}: {violation['help']} ({places})"
                print(f"    {line}")
                if violation["impact"] in ("serious", "critical"):
                    self.problems.append(line)
        self.page.emulate_media(color_scheme="light")

    def edges(self) -> None:
        """Contrast of what must be seen to be used (WCAG 1.4.11), which axe-core does not measure: 3 to 1 at least."""
        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme)
            for selector in ("#drop", "#demo", "#question", "#ask", "#modes label span", "#preset"):
                colours = self.page.eval_on_selector(
                    selector,
                    "e => [getComputedStyle(e).borderTopColor, getComputedStyle(document.body).backgroundColor]",
                )
                ratio = contrast(*colours)
                self.expect(ratio >= 3, f"the edge of {selector} has a contrast of {ratio:.2f}, {scheme}")
        self.page.emulate_media(color_scheme="light")

    def widths(self, name: str) -> None:
        """Whether the page fits, from a phone to a desk."""
        for width in WIDTHS:
            self.page.set_viewport_size({"width": width, "height": 640 if width < 700 else 900})
            self.page.wait_for_timeout(100)
            over = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            if over > 0:
                self.problems.append(f"{name}: {over} pixels too wide at {width}")
            self.picture(f"{name}-{width}", full_page=True)
        self.page.set_viewport_size({"width": 1024, "height": 800})

    def picture(self, name: str, **options: Any) -> None:
        if self.pictures is not None:
            self.page.screenshot(path=str(self.pictures / f"{name}.png"), **options)

    def expect(self, condition: bool, what: str) -> None:
        if not condition:
            self.problems.append(what)

    def choose(self, picture: PIL.Image.Image) -> None:
        """Gives the page a picture, and waits until it has read it."""
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            picture.save(file.name)
            self.page.set_input_files("#file", file.name)
            name = re.compile(rf"{picture.width} . {picture.height} pixels")
            self.page.locator("#picture-name", has_text=name).wait_for()

    def ask(self, question: str, wait: bool = True) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        if wait:
            self.wait_done()

    def wait_done(self) -> None:
        self.page.locator("#status:text-is('Done.')").wait_for()

    def choose_files(self, *files: Path, name: str) -> None:
        """Gives the page files, and waits until it says so."""
        self.page.set_input_files("#file", [str(file) for file in files])
        self.page.locator("#picture-name", has_text=re.compile(name)).wait_for()

    def refused(self, words: str) -> None:
        """Waits for an error, which must have these words."""
        self.page.wait_for_selector("#error:visible")
        self.expect(words in self.text("#error"), f"in place of {words!r}: {self.text('#error')}")

    def captions(self) -> list[str]:
        return [str(text) for text in self.page.locator("#panels figcaption").all_inner_texts()]

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).last.inner_text())

    def close(self) -> list[str]:
        self.context.close()
        return self.problems


def code(visit: Visit, *files: Path) -> None:
    """The copied code runs beside the files, and asks what the page asked."""
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            shutil.copy(file, folder)
        for button, command in ((".copy-curl", ["bash"]), (".copy-python", [sys.executable])):
            visit.page.locator(button).last.click()
            text = visit.text(".snippet pre")
            if command == ["bash"] and shutil.which("curl") is None:
                continue
            done = subprocess.run([*command, "-"], input=text, capture_output=True, text=True, cwd=folder)
            answer = visit.page.locator(".turn").last.locator(".pruned .answer").inner_text()
            visit.expect(
                done.returncode == 0 and answer in done.stdout, f"{button}: {done.stdout[-300:]}{done.stderr[-600:]}"
            )
