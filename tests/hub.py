"""A Hugging Face hub on loopback: the few routes that hf_hub_download uses, for files that a test provides.

HEAD and GET of /datasets/OWNER/REPO/resolve/REVISION/NAME, and of the same without /datasets for models, with ETag,
X-Repo-Commit, Content-Length and Range. A test may have a connection cut in the middle of a body, once,
or held there.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "5" * 40


@dataclass
class Hub:
    """`files` by repository and name, as in "datasets/owner/repo/name". `requests` is what was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)  # in place of the SHA-256 of the file
    cut_after: dict[str, int] = field(default_factory=dict)  # bytes of body, after which the connection drops, once
    hold: dict[str, threading.Event] = field(default_factory=dict)  # half of the body waits for this event
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, file, range
    url: str = ""

    def etag(self, name: str) -> str:
        return self.etags.get(name) or hashlib.sha256(self.files[name]).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers out of the Hub that its server carries."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        name, start = self.answer()
        hub = self.server.hub
        if name not in hub.files:
            return
        body = hub.files[name]
        middle = max(start, len(body) // 2)
        if name in hub.cut_after:
            self.wfile.write(body[start : hub.cut_after.pop(name)])
            self.close_connection = True
            return
        self.wfile.write(body[start:middle])
        if name in hub.hold:
            hub.hold[name].wait(10)
        with suppress(OSError):  # the client may have been killed meanwhile
            self.wfile.write(body[middle:])

    def answer(self) -> tuple[str, int]:
        """Sends status and headers; returns the file's name and the first byte that is asked for."""
        hub = self.server.hub
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        name = f"{repo}/{rest.partition('/')[2]}"
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        hub.requests.append((self.command, name, asked))
        size = len(hub.files.get(name, b""))
        self.send_response((206 if asked else 200) if name in hub.files else 404)
        if name not in hub.files:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hub.etag(name)}"')
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        return name, start

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class HubServer(ThreadingHTTPServer):
    hub: Hub


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves `hub` at hub.url until the block ends."""
    server = HubServer(("127.0.0.1", 0), Handler)
    server.hub = hub
    thread = threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
