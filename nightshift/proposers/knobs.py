"""CMA-ES over the constants that train.py marks: needs no key and no network, and is what an LLM has to beat.

A mark stands behind a constant at the top level, on its own line:

    MATRIX_LR = 0.04  # knob: log 0.01 0.16       a positive number, searched by ratio
    WARMDOWN = 0.5  # knob: lin 0 1               a number; a literal without a point stays an integer
    DEPTH = 4  # knob[cuda]: int 2 12             an integer, here on CUDA only ([cpu]: on a CPU only)
    PATTERN = "SSSL"  # knob: choice L SL SSSL    one of these

Text after a semicolon is comment. The search lives in a unit cube around the values that the night began with. Its
state is nowhere stored: asking and telling are replayed from the night's seed and its history, so that a night that
was killed goes on with the very same proposals. (CMA-ES: N. Hansen, arXiv:1604.00772.)
"""

from __future__ import annotations

import ast
import math
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from nightshift.values import Brief, Proposal, Stop

Value = bool | int | float | str | None
POPULATION = 6
FIRST_STEP = 0.12  # standard deviation of the first proposals, in widths of a knob's range
FAMILY = re.compile(r"cma-es (\d+)")  # of a proposal: which ask it was
REDRAWS = 50
SYNTAX = "NAME = 0.04  # knob: log 0.01 0.16   (or: lin A B, int A B, choice A B C; knob[cuda]: or knob[cpu]: for one)"
MARK = re.compile(r"\s*#\s*knob(?:\[(?P<device>\w*)\])?:\s*(?P<kind>\w+)\s+(?P<args>[^;#]*?)\s*(?:[;#].*)?$")


@dataclass(frozen=True)
class Knob:
    """A marked constant: where its literal stands in train.py, what it is, and what it may become."""

    name: str
    line: int  # from 0
    start: int  # in characters, of the literal within its line
    end: int
    literal: str
    value: Value
    kind: Literal["log", "lin", "int", "choice"]
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Value, ...] = ()

    def encode(self, value: Value) -> float:
        """Where a value lies in [0, 1]; an integer or a choice in the middle of its share."""
        if self.kind == "choice":
            return (_index(self.choices, value) + 0.5) / len(self.choices)
        assert isinstance(value, int | float)
        if self.kind == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        if self.kind == "int":
            return (value - self.low + 0.5) / (self.high - self.low + 1)
        return (value - self.low) / (self.high - self.low)

    def decode(self, x: float) -> Value:
        """The value at x in [0, 1], as it will stand in train.py: 4 significant digits, integers whole."""
        if self.kind == "choice":
            return self.choices[min(int(x * len(self.choices)), len(self.choices) - 1)]
        if self.kind == "int":
            return int(min(self.low + int(x * (self.high - self.low + 1)), self.high))
        span = self.high - self.low
        number: float = self.low * (self.high / self.low) ** x if self.kind == "log" else self.low + x * span
        if isinstance(self.value, int):
            return round(number)
        return min(max(float(f"{number:.4g}"), self.low), self.high)

    def render(self, value: Value) -> str:
        """The literal of a value; a value that has not changed keeps its spelling."""
        if type(value) is type(self.value) and value == self.value:
            return self.literal
        quote = self.literal[-1]
        as_is = isinstance(value, str) and not set(value) & set("\\'\"\r\n")
        if as_is and self.literal == f"{quote}{self.value}{quote}":
            return f"{quote}{value}{quote}"
        return repr(value)


def _index(choices: tuple[Value, ...], value: Value) -> int:
    """Position by type and value: True is not 1."""
    return next(i for i, c in enumerate(choices) if type(c) is type(value) and c == value)


def parse(train_py: str, device_kind: str) -> list[Knob]:
    """The knobs of a train.py on "cuda" or "cpu", in the order of their lines.

    Raises Stop naming the line where a mark cannot be understood, or where train.py does not parse.
    """
    try:
        tree = ast.parse(train_py)
    except (SyntaxError, ValueError) as error:
        raise Stop(f"train.py cannot be read for knobs: {error}; `python train.py` shows the error in full") from None
    lines = split_lines(train_py)
    knobs: dict[str, Knob] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        line = lines[(node.value.end_lineno or 0) - 1].encode()
        comment = line[node.value.end_col_offset or 0:].decode().rstrip("\r\n")
        if not isinstance(target, ast.Name) or not re.match(r"\W*#\s*knob\b", comment):
            continue
        mark = MARK.match(comment)
        if mark is None:
            raise _malformed(target.id, node.lineno, "the mark cannot be read")
        if mark["device"] not in (None, "cuda", "cpu"):
            raise _malformed(target.id, node.lineno, f"[{mark['device']}] is neither [cuda] nor [cpu]")
        if mark["device"] not in (None, device_kind):
            continue
        if target.id in knobs:
            raise _malformed(target.id, node.lineno, "it is marked twice")
        knobs[target.id] = _knob(target.id, node.value, line, mark["kind"], mark["args"].split())
    return list(knobs.values())


def split_lines(text: str) -> list[str]:
    """Lines with their ends, cut where Python's parser cuts (str.splitlines also cuts at form feeds and others)."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)


def _malformed(name: str, line: int, why: str) -> Stop:
    return Stop(f"train.py line {line}: the knob of {name}: {why}; a mark reads {SYNTAX}")


def _knob(name: str, node: ast.expr, line: bytes, kind: str, words: list[str]) -> Knob:
    """A Knob from its mark. A range or choice that leaves out the value in use is widened by it."""
    if node.lineno != node.end_lineno:
        raise _malformed(name, node.lineno, "its value runs over several lines")
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise _malformed(name, node.lineno, "its value is no literal") from None
    start, end = (len(line[:offset].decode()) for offset in (node.col_offset, node.end_col_offset or 0))
    literal = line.decode()[start:end]
    if kind == "choice":
        if not (value is None or isinstance(value, bool | int | float | str)) or len(words) < 2:
            raise _malformed(name, node.lineno, "a choice takes two or more plain values")
        choices = tuple(_word(word) for word in words)
        if not any(type(c) is type(value) and c == value for c in choices):
            choices = (*choices, value)
        return Knob(name, node.lineno - 1, start, end, literal, value, "choice", choices=choices)
    if kind not in ("log", "lin", "int"):
        raise _malformed(name, node.lineno, f"{kind!r} is none of log, lin, int, choice")
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else int | float):
        raise _malformed(name, node.lineno, f"{kind} does not fit {literal}")
    try:
        low, high = sorted(float(word) for word in words)
    except ValueError:
        raise _malformed(name, node.lineno, f"{kind} takes two numbers") from None
    low, high = min(low, value), max(high, value)
    if isinstance(value, int) and low % 1 + high % 1:
        raise _malformed(name, node.lineno, f"a whole number cannot go from {low:g} to {high:g}; write it with a point")
    if not low < high < math.inf or (kind == "log" and low <= 0):
        raise _malformed(name, node.lineno, f"{kind} cannot go from {low:g} to {high:g}")
    return Knob(name, node.lineno - 1, start, end, literal, value, kind, low, high)  # type: ignore[arg-type]


def _word(word: str) -> Value:
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word
    return value if value is None or isinstance(value, bool | int | float | str) else word


def replace(train_py: str, knobs: list[Knob], values: Mapping[str, Value]) -> str:
    """`train_py` with the knobs in `values` set, by name; every other character stays as it is."""
    lines = split_lines(train_py)
    for knob in sorted(knobs, key=lambda k: (k.line, k.start), reverse=True):
        if knob.name in values:
            line = lines[knob.line]
            lines[knob.line] = line[:knob.start] + knob.render(values[knob.name]) + line[knob.end:]
    return "".join(lines)


def draws(knobs: list[Knob], seed: int, told: Mapping[int, float]) -> Iterator[tuple[dict[str, Value], int]]:
    """The search's asks, one after another, each with its generation; `told` holds the scores of earlier asks.

    An ask without a score (never run, or another proposer's) is passed over; a generation ends once POPULATION of its
    asks are told. They are told as ranks, so a failure's infinity comes last without blurring the others. Values
    that were asked before, or that the night began with, are drawn again, in the end from the whole cube; the search
    is over when nothing new is found there either.
    """
    import numpy as np
    from cmaes import CMA

    mean = np.clip(np.array([knob.encode(knob.value) for knob in knobs]), 0.0, 1.0)
    bounds = np.tile([0.0, 1.0], (len(knobs), 1))
    dice = np.random.RandomState(seed % 2**32)
    search = CMA(mean, FIRST_STEP, bounds=bounds, seed=seed % 2**32, population_size=POPULATION)
    seen = {tuple(knob.value for knob in knobs)}
    pending: list[tuple[np.ndarray, float]] = []
    index = 0
    while True:
        for attempt in range(2 * REDRAWS):
            x = search.ask() if attempt < REDRAWS else dice.uniform(size=len(knobs))
            values = tuple(knob.decode(float(u)) for knob, u in zip(knobs, x, strict=True))
            if values not in seen:
                break
        else:
            return
        seen.add(values)
        yield dict(zip((knob.name for knob in knobs), values, strict=True)), search.generation
        if index in told:
            pending.append((x, told[index]))
        if len(pending) == POPULATION:
            ranked = sorted(pending, key=lambda pair: pair[1])
            search.tell([(x, float(rank)) for rank, (x, _) in enumerate(ranked)])
            pending = []
        index += 1


class Knobs:
    """Turns the knobs, one set of values at a time. `root` is the repository that holds the night's first train.py."""

    name = "knobs"
    ahead = False

    def __init__(self, device_kind: str, root: Path) -> None:
        self.device_kind = device_kind
        self.root = root
        self._first = ""

    def propose(self, brief: Brief) -> Proposal | None:
        """The incumbent's train.py with its knobs turned; None once every setting has been tried.

        Raises Stop where no knob is marked.
        """
        start = self._first_text(brief)
        current = parse(brief.train_py, self.device_kind)
        first = parse(start, self.device_kind) if start else current
        if not first or not current:
            raise Stop(f"the knobs proposer found no knob for {self.device_kind} in train.py; mark a constant, as in "
                       f"{SYNTAX}, or choose another proposer with --proposer")
        told = {}
        for past in brief.history if start else ():
            ask = FAMILY.fullmatch(past.family)
            if past.proposer == self.name and ask:
                told[int(ask[1])] = math.inf if past.score is None else past.score
        drawn = next(islice(draws(first, brief.night_seed, told), brief.asked, None), None)
        if drawn is None:
            return None
        values, generation = drawn
        moved = _moves(current, values)
        where = f"CMA-ES, generation {generation + 1}, around the values that the night began with: "
        return Proposal(title=", ".join(moved[:3]) or "no knob moved", hypothesis=where + ", ".join(moved),
                        train_py=replace(brief.train_py, current, values), proposer=self.name,
                        family=f"cma-es {brief.asked}")

    def _first_text(self, brief: Brief) -> str:
        """The train.py that the night began with: the incumbent's until a keep, then the first baseline's, from git.

        Empty where neither is to be had; the search then begins anew around the incumbent.
        """
        if not self._first and brief.task.parent == 0:
            self._first = brief.train_py
        baseline = next((past.blob for past in brief.history if past.kind == "baseline"), "")
        if not self._first and baseline:
            command = ["git", "-C", str(self.root), "cat-file", "blob", baseline]
            self._first = subprocess.run(command, capture_output=True, check=False).stdout.decode()
        return self._first


def _moves(current: list[Knob], values: Mapping[str, Value]) -> list[str]:
    """What changes against the incumbent, as NAME old→new, the largest move within its range first."""
    moved: list[tuple[float, str]] = []
    for knob in current:
        new = values.get(knob.name, knob.value)
        if knob.render(new) != knob.literal:
            far = 1.0 if knob.kind == "choice" else abs(knob.encode(new) - knob.encode(knob.value))
            moved.append((-far, f"{knob.name} {knob.literal}→{knob.render(new)}"))
    return [text for _, text in sorted(moved)]
