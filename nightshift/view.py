"""What one sees while a night runs: a calm live picture in a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.control import Control
from rich.live import Live as Picture
from rich.padding import Padding
from rich.text import Text

from nightshift import panels
from nightshift.ledger import State, clean, description
from nightshift.panels import Pulse
from nightshift.values import Candidate

if TYPE_CHECKING:
    from nightshift.runner import Live

WRITE_EVERY_S = 1.0
REFRESHES_PER_S = 4
WIDEST = 120  # columns of the picture
AROUND = 11  # its lines beside the results, with the blank ones


def drawable() -> bool:
    """Whether standard output is a terminal to draw on: not a dumb one, and no NO_COLOR (no-color.org) is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


class View:
    """Follows a night: says what happens, and keeps live.json for `status` in another process.

    A night does not end because nobody can watch it: a closed terminal and a full disk are passed over.
    """

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a title may hold what the terminal's encoding does not
        self._screen = Screen() if drawable() else None
        self._candidate: Candidate | None = None
        self._pulse = Pulse("starting", 0, None, 0, 0.0, 0.0, 0.0)
        self._written = -math.inf

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """News, a line or more."""
        told = "\n".join(clean(part) for part in text.splitlines())
        with contextlib.suppress(OSError):
            if self._screen:
                self._screen.say(told)
            else:
                print(told, flush=True)

    def starts(self, candidate: Candidate, state: State) -> None:
        """A run begins."""
        self._candidate, self._written = candidate, -math.inf
        self._beat(Pulse("starting", 0, None, 0, 0.0, 0.0, time.time()))
        if self._screen:
            self._screen.show(state, self._pulse)
        else:
            self.say(f"run {candidate.task.number} ({candidate.task.kind}): {clean(candidate.title)}")

    def watch(self, live: Live) -> None:
        """A run goes on."""
        rate = self._pulse.tokens_per_s
        if live.tokens != self._pulse.tokens and live.elapsed_s > 0:
            rate = live.tokens / live.elapsed_s
        loss = live.loss if math.isfinite(live.loss) else None
        self._beat(Pulse(live.phase, live.step, loss, live.tokens, rate, live.elapsed_s, time.time()))
        if self._screen:
            self._screen.pulse = self._pulse

    def ended(self, state: State) -> None:
        """A run is decided."""
        if self._candidate is not None:
            with contextlib.suppress(OSError):
                _live_json(self._candidate).unlink()
            self._candidate = None
        if self._screen:
            self._screen.show(state, None)
            return
        row = state.rows[-1]
        parts = [f"run {row.number}: {row.status}"]
        if row.score is not None:
            unit = "val_bpb" if state.rules["objective"] == "val_bpb" else "seconds"
            parts.append(f"{unit} {panels.figure(state, row.score)}")
        if row.delta is not None:
            parts.append(f"delta {panels.figure(state, row.delta, '+')}")
        if row.p_better is not None:
            parts.append(f"p {row.p_better:.2f}")
        self.say(f"{', '.join([*parts, f'{row.total_s:.1f} s'])}: {description(row)}")

    def close(self) -> None:
        """No more runs: the results stay on the screen, and what is said from here on stands below them."""
        if self._screen:
            with contextlib.suppress(OSError):
                self._screen.close()

    def _beat(self, pulse: Pulse) -> None:
        """Notes what the run is doing, and writes it down where the last time is a while ago."""
        self._pulse = pulse
        if self._candidate is None or time.monotonic() - self._written < WRITE_EVERY_S:
            return
        self._written = time.monotonic()
        path = _live_json(self._candidate)
        told = {"pid": os.getpid(), "number": self._candidate.task.number, "title": self._candidate.title}
        part = path.with_name(".live.json.part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(told | asdict(pulse)))
            part.replace(path)


def _live_json(candidate: Candidate) -> Path:
    """Of the candidate's night: the run's folder is .nightshift/<tag>/runs/<number>."""
    return candidate.folder.parents[1] / "live.json"


class Screen:
    """The live picture: the running experiment, the incumbent and the last results; news scrolls by above it."""

    def __init__(self) -> None:
        self.pulse: Pulse | None = None
        self._state: State | None = None
        self._shown_at = 0.0
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._picture: Picture | None = None
        self._closing = False
        self._width = 0

    def say(self, text: str) -> None:
        """A line above the picture; a long one is left whole, so that a command in it can be copied."""
        self._console.print(Text(text), soft_wrap=True)

    def show(self, state: State, pulse: Pulse | None) -> None:
        """The picture, from now on of this; it appears with the night's first run."""
        self._state, self.pulse, self._shown_at = state, pulse, time.time()
        if self._picture is None:
            self._picture = Picture(
                get_renderable=self._frame,
                console=self._console,
                refresh_per_second=REFRESHES_PER_S,
                vertical_overflow="crop",
            )
            self._picture.start(refresh=True)

    def close(self) -> None:
        """Leaves the results on the screen, without the run in flight, and the terminal as it was."""
        if self._picture is not None and not self._closing:
            self._closing = True
            self._picture.stop()
            self._console.print()

    def _frame(self) -> RenderableType:
        """The picture for the terminal's size of now."""
        size = self._console.size
        if size.width < self._width:  # the terminal broke the old picture's lines: nobody knows how many there are now
            self._console.control(Control.clear(), Control.home())
        self._width = size.width
        state = self._state
        if state is None:
            return Text()
        width, now = min(size.width, WIDEST), time.time()
        parts: list[RenderableType] = [panels.heading(state), Text()]
        if not self._closing:
            parts += [panels.running(state, self.pulse, now, now - self._shown_at), Text()]
        parts += [panels.incumbent(state), panels.limits(state, None if self._closing else now)]
        rows = min(panels.LAST, len(state.rows), size.height - AROUND)
        if rows > 0:
            parts += [Text(), panels.results(state, width - 2, rows)]
        return Padding(Constrain(Group(*parts), width), (1, 1, 0, 1), expand=False)
