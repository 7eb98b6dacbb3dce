"""A server on loopback that speaks the Messages API as far as nightshift uses it, and answers from a script."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

THINKING = {"type": "thinking", "thinking": "", "signature": "c2lnbmVk"}
Json = dict[str, Any]


@dataclass
class Reply:
    """One scripted answer: an error with its status, or a message as a stream, whole or broken off."""

    content: list[Json] = field(default_factory=list)
    stop_reason: str = "end_turn"
    usage: Json = field(default_factory=lambda: {"input_tokens": 1000, "output_tokens": 200})
    status: int = 200
    error: Json | None = None  # with status 200: an error event in the middle of the stream
    headers: dict[str, str] = field(default_factory=dict)
    break_off: bool = False  # close the connection in the middle of the answer
    clean: bool = False  # break off by ending the body in good order instead
    stop_details: Json | None = None
    delay_s: float = 0.0  # between the first event and the rest


def tool_use(**fields: Any) -> Reply:
    """An answer that calls propose_experiment; title, hypothesis, family and expected_delta have defaults."""
    given = {"title": "a title", "hypothesis": "because", "family": "schedule", "expected_delta": -0.01, **fields}
    call = {"type": "tool_use", "id": f"toolu_{time.monotonic_ns()}", "name": "propose_experiment", "input": given}
    return Reply([THINKING, call], "tool_use")


def edit(search: str, replace: str, **fields: Any) -> Reply:
    """An answer that proposes one edit."""
    return tool_use(edits=[{"search": search, "replace": replace}], **fields)


def says(text: str) -> Reply:
    """An answer in words alone."""
    return Reply([{"type": "text", "text": text}])


def failure(status: int, kind: str, message: str, code: str = "", **headers: str) -> Reply:
    """An error as the API words it; underscores in header names become hyphens."""
    error: Json = {"type": kind, "message": message}
    if code:
        error["details"] = {"error_code": code}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status=status, error=error, headers=named)


class MessagesServer(ThreadingHTTPServer):
    """Use as a context; `requests` and `times` hold what came in, `url` goes into ANTHROPIC_BASE_URL."""

    def __init__(self, *script: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.requests: list[Json] = []
        self.times: list[float] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> MessagesServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the next line of the server's script."""

    protocol_version = "HTTP/1.1"
    server: MessagesServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.times.append(time.monotonic())
        self.server.requests.append(request)
        assert self.path == "/v1/messages" and request["stream"] is True
        at = len(self.server.requests) - 1
        over = failure(400, "invalid_request_error", "the script is at its end")
        reply = self.server.script[at] if at < len(self.server.script) else over
        if reply.status == 200:
            self._send_stream(reply, request["model"])
        else:
            self._send_error_body(reply)

    def _send_error_body(self, reply: Reply) -> None:
        body = json.dumps({"type": "error", "error": reply.error}).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _send_stream(self, reply: Reply, model: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("connection", "close")
        self.end_headers()
        for number, event in enumerate(events(reply, model)):
            if number == 1:
                time.sleep(reply.delay_s)
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
            if event["type"] == "content_block_delta" and reply.break_off:
                if reply.clean:
                    break
                return
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output free of access lines."""


def events(reply: Reply, model: str) -> Iterator[Json]:
    """A reply as the events of a Messages stream."""
    message: Json = {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": [],
                     "stop_reason": None, "stop_sequence": None, "usage": reply.usage | {"output_tokens": 1}}
    yield {"type": "message_start", "message": message}
    if reply.error is not None:
        yield {"type": "error", "error": reply.error}
        return
    for index, block in enumerate(reply.content):
        yield {"type": "content_block_start", "index": index, "content_block": _opening(block)}
        for delta in _deltas(block):
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    end = {"stop_reason": reply.stop_reason, "stop_sequence": None}
    if reply.stop_details is not None:
        end["stop_details"] = reply.stop_details  # type: ignore[assignment]
    yield {"type": "message_delta", "delta": end, "usage": {"output_tokens": reply.usage["output_tokens"]}}
    yield {"type": "message_stop"}


def _opening(block: Json) -> Json:
    if block["type"] == "tool_use":
        return block | {"input": {}}
    return block | ({"text": ""} if block["type"] == "text" else {"signature": ""})


def _deltas(block: Json) -> Iterator[Json]:
    if block["type"] == "thinking":
        yield {"type": "signature_delta", "signature": block["signature"]}
    elif block["type"] == "text":
        yield {"type": "text_delta", "text": block["text"]}
    else:
        written = json.dumps(block["input"])
        for start in range(0, len(written), 50):
            yield {"type": "input_json_delta", "partial_json": written[start:start + 50]}
