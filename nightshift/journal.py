"""The truth about a night: one fsynced line a transition, each with the hash of the line before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from nightshift.values import Stop

Event = dict[str, Any]
FIRST = "0" * 64  # what stands for the hash before the first line


def parse(text: bytes, name: str = "journal") -> tuple[list[Event], int]:
    """The events of a journal and the length in bytes of their whole lines.

    A last line that lost its end (a kill or a full disk in the middle of a write) is left out. A line before it that
    is not JSON, out of order, or does not follow from the line before is a Stop: somebody edited the journal.
    """
    events: list[Event] = []
    previous, length = FIRST, 0
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        try:
            event = json.loads(line)
            follows = event["prev"] == previous and event["n"] == number
        except (ValueError, KeyError, TypeError):
            follows = False
        if not follows:
            raise Stop(
                f"{name}: line {number} does not follow from the line before it: the journal was changed by hand. "
                "Bring back the copy in experiments/, or start a new night with --tag"
            )
        previous = hashlib.sha256(line).hexdigest()
        length += len(line) + 1
        events.append(event)
    return events, length


class Journal:
    """An append-only file of events. One writer at a time; safe to append to from several threads of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_bytes() if path.exists() else b""
            self.events, length = parse(text, str(path))
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise Stop(
                f"{path}: {error.strerror}; a night cannot go on without its journal. "
                "Mend that, then: python loop.py run"
            ) from None
        last = text[:length].split(b"\n")[-2] if self.events else None
        previous = FIRST if last is None else hashlib.sha256(last).hexdigest()
        self._end = (len(self.events), length, previous)  # events, bytes, and the hash of the last line

    def append(self, event_name: str, /, **fields: Any) -> Event:
        """Writes one event and returns it, as a reader would get it, once it is on disk.

        A full disk is a Stop, and leaves the journal whole. So does Ctrl-C, which may raise anywhere in here: either
        the event is written, or the next append cuts off what there is of it.
        """
        assert not fields.keys() & {"n", "at", "event", "prev"}, "these are the journal's own"
        with self._lock:
            n, length, previous = self._end
            head = {"n": n + 1, "at": round(time.time(), 3), "event": event_name}
            event = {**head, **fields, "prev": previous}
            line = json.dumps(event, ensure_ascii=False, allow_nan=False).encode(errors="replace")
            try:
                os.ftruncate(self._fd, length)
                self._write(line + b"\n")
            except OSError as error:
                os.ftruncate(self._fd, length)
                cause = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
                raise Stop(
                    f"{self.path}: {cause}; the ledger is whole up to here. Make room, then: python loop.py run"
                ) from None
            self._end = (n + 1, length + len(line) + 1, hashlib.sha256(line).hexdigest())
            self.events.append(json.loads(line))
            return self.events[-1]

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
