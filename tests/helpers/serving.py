"""A `star-edge serve` of the reference model in a process of its own, and ways to talk to it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import openai

from star_edge import refvlm

COMMAND = (sys.executable, "-c", "from star_edge.cli import main; main()", "serve")


def data_url(path=refvlm.DEMO_IMAGE):
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


DEMO = data_url()
COLOR = "what color is the triangle?"
LONG = {"max_tokens": 600, "extra_body": {"min_tokens": 600}}  # an answer of seconds: the end token is forbidden


def message(question, *urls):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": question}]}


class Server:
    def __init__(self, *options, environment=None):
        self.process = subprocess.Popen(
            [*COMMAND, "--port", "0", "--json", "-t", "1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.ready = json.loads(line)
        self.url = self.ready["url"]

    def client(self, key="none", **options):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, **{"max_retries": 0, **options})

    def request(self, method, path, body=None, headers=None):
        """(status, headers, body: from JSON or as text where it is such)."""
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.url).netloc, timeout=300)
        try:
            data = json.dumps(body) if isinstance(body, (dict, list)) else body
            headers = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, data, headers, encode_chunked="Transfer-Encoding" in headers)
            answer = connection.getresponse()
            text = answer.read()
            kind = answer.headers.get("Content-Type", "")
            return (
                answer.status,
                answer.headers,
                json.loads(text) if "json" in kind else text if "image" in kind else text.decode(),
            )
        finally:
            connection.close()

    def metric(self, line):
        """A value of /metrics; 0 where the line is not there yet."""
        found = re.search(rf"^{re.escape(line)} (\S+)$", self.request("GET", "/metrics")[2], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait(self, condition, seconds=300):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)

    def stop(self, how=signal.SIGTERM):
        """Exit status and stderr."""
        self.process.send_signal(how)
        try:
            _, stderr = self.process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode, stderr


def ask(client, *urls, question=COLOR, **options):
    options = {"model": "any", "temperature": 0, "max_tokens": 4, **options}
    return client.chat.completions.create(messages=[message(question, *(urls or [DEMO]))], **options)


def text_of(response):
    return response.choices[0].message.content.strip()


@contextlib.contextmanager
def busy(server, key="none"):
    """The engine is at a long answer inside the block."""
    with ask(server.client(key), stream=True, **LONG) as stream:
        next(iter(stream))
        yield
    server.wait(lambda: server.request("GET", "/health")[2]["waiting"] == 0)
