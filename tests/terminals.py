"""A terminal for tests: a pseudo-terminal around a real process, and a screen that shows what a person would see."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import TracebackType

UNFINISHED = re.compile(r"\x1b(\[[?\d;]*)?$")
TOKEN = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)|(\x1b)")


class Screen:
    """What stands on a terminal of so many columns and rows. An escape sequence unknown to it fails the test."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines = [""]  # with those that have scrolled away
        self.x = self.y = 0
        self.cursor_shown = True
        self.clears = 0

    @property
    def top(self) -> int:
        """The first line that has not scrolled away."""
        return max(0, len(self.lines) - self.rows)

    def feed(self, text: str) -> None:
        """Shows what a process has written; whole sequences only."""
        for code, verb, feed, words, strange in TOKEN.findall(text):
            assert not strange, "an escape that is no control sequence"
            if verb:
                self._obey(code, verb)
            elif feed == "\r":
                self.x = 0
            elif feed == "\n":
                self._down()
            for letter in words:
                self._put(letter)

    def _put(self, letter: str) -> None:
        if self.x == self.columns:
            self.x = 0
            self._down()
        line = self.lines[self.y].ljust(self.x)
        self.lines[self.y] = line[: self.x] + letter + line[self.x + 1 :]
        self.x += 1

    def _down(self) -> None:
        self.y += 1
        if self.y == len(self.lines):
            self.lines.append("")

    def _obey(self, code: str, verb: str) -> None:
        if verb == "A":
            self.y = max(self.top, self.y - int(code or 1))
        elif (code, verb) == ("2", "K"):
            self.lines[self.y] = ""
        elif (code, verb) == ("2", "J"):
            self.clears += 1
            self.lines[self.top :] = [""] * len(self.lines[self.top :])
        elif verb == "H":
            self.x, self.y = 0, self.top
        elif (code, verb) in (("?25", "l"), ("?25", "h")):
            self.cursor_shown = verb == "h"
        else:
            assert verb == "m", f"a sequence that this screen does not know: {code}{verb}"

    @property
    def text(self) -> str:
        """All lines, those included that have scrolled away."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip()


class Terminal:
    """`python -c code` on a terminal of its own; the process is gone when the block ends."""

    def __init__(self, code: str, columns: int = 100, rows: int = 40, **environment: str) -> None:
        self.screen = Screen(columns, rows)
        self.written = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self._fd, theirs = pty.openpty()
        self.resize(columns, rows)
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**kept, "PYTHONPATH": path, "TERM": "xterm-256color", **environment},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def resize(self, columns: int, rows: int) -> None:
        """Makes the window larger or smaller; what stood on it is not laid out anew."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.columns, self.screen.rows = columns, rows

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def until(self, wanted: str, seconds: float = 20.0) -> None:
        """Shows what the process writes until it has written this."""
        start = len(self.written)
        while wanted not in self.written[start:]:
            assert self._show(seconds), f"it ended before it wrote {wanted!r}:\n{self.written}"

    def finish(self, seconds: float = 20.0) -> int:
        """Shows what the process writes to its end, and returns its exit status."""
        while self._show(seconds):
            pass
        return self.process.wait(seconds)

    def _show(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], seconds)
        assert ready, f"nothing for {seconds} s after:\n{self.written}"
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # how a pseudo-terminal says that its last process has gone
            return False
        text = self._decoder.decode(data)
        self.written += text
        self._pending += text
        cut = UNFINISHED.search(self._pending)
        whole = self._pending[: cut.start()] if cut else self._pending
        self._pending = self._pending[len(whole) :]
        self.screen.feed(whole)
        return True
