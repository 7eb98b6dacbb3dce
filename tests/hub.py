"""A Hugging Face hub on loopback: the few routes that hf_hub_download uses, for files that a test provides.

HEAD and GET of /datasets/OWNER/REPO/resolve/REVISION/NAME, and of the same without /datasets for models, with ETag,
X-Repo-Commit, Content-Length and Range. A test may have a connection cut in the middle of a body, once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "5" * 40


@dataclass
class Hub:
    """`files` by repository and name, as in "datasets/owner/repo/name". `requests` is what was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)  # in place of the SHA-256 of the file
    cut_after: dict[str, int] = field(default_factory=dict)  # bytes of body, after which the connection drops, once
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, file, range
    url: str = ""

    def etag(self, name: str) -> str:
        return self.etags.get(name) or hashlib.sha256(self.files[name]).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves `hub` at hub.url until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            name = f"{repo}/{rest.partition('/')[2]}"
            asked = self.headers.get("Range", "")
            hub.requests.append((self.command, name, asked))
            if name not in hub.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = hub.files[name]
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("ETag", f'"{hub.etag(name)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if with_body and name in hub.cut_after:
                self.wfile.write(body[start : hub.cut_after.pop(name)])
                self.close_connection = True
            elif with_body:
                self.wfile.write(body[start:])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
