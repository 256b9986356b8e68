"""Servers on loopback, each in a process of its own: what a tracking URI may lead to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

_SERVER = """
import http.server, json, sys

STATUS, LOG = int(sys.argv[1]), sys.argv[2]

def spans_of(body):
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
    request = trace_service_pb2.ExportTraceServiceRequest()
    request.ParseFromString(body)
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                attributes = {pair.key: pair.value.string_value for pair in span.attributes}
                yield {"name": span.name, "attributes": attributes}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if LOG and STATUS == 200:
            import gzip
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            with open(LOG, "a") as log:
                for span in spans_of(body):
                    log.write(json.dumps(span) + "\\n")
        self.send_response(STATUS)
        self.send_header("content-length", "0")
        self.end_headers()
    do_GET = do_POST
    def log_message(self, *_): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""

_HUNG = """
import socket, time
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(100)
print(listener.getsockname()[1], flush=True)
time.sleep(600)
"""


@contextmanager
def _serving(script: str, *arguments: str) -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def answering(status: int) -> AbstractContextManager[str]:
    """Run a server that gives every request the same answer; the block gets its URI."""
    return _serving(_SERVER, str(status), "")


def hung() -> AbstractContextManager[str]:
    """Run a server that takes connections and never answers."""
    return _serving(_HUNG)


class Collector:
    """An OTLP endpoint, and the spans that it got."""

    def __init__(self, uri: str, log: Path) -> None:
        self.uri = uri
        self._log = log

    def spans(self) -> dict[str, dict[str, str]]:
        """Return the attributes of the spans by their names, as they were sent."""
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        found = [json.loads(line) for line in lines]
        return {span["name"]: span["attributes"] for span in found}


@contextmanager
def collecting(folder: Path, status: int = 200) -> Iterator[Collector]:
    """Run an OTLP endpoint that keeps what it gets, or refuses it."""
    log = folder / "collected.jsonl"
    with _serving(_SERVER, str(status), str(log)) as uri:
        yield Collector(uri, log)
