"""The knobs proposer: its marks, its search, and that a resumed night goes on with the same proposals."""

from __future__ import annotations

import ast
import math
import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift import brief as briefs
from nightshift import lint
from nightshift.config import load
from nightshift.proposers.knobs import FIRST_STEP, Knob, Knobs, draws, parse, replace, split_lines
from nightshift.values import Past, Proposal, Stop, Task

TRAIN = '''"""A docstring with LR = 1  # knob: log 1 2 in it."""
import math
MATRIX_LR = 0.04  # knob: log 0.01 0.16
MOMENTUM: float = 0.95  # knob: lin 0.8 0.99; warmed up
DEPTH = 4  # knob[cpu]: int 2 8
WIDTH = 768  # knob[cuda]: int 512 1024
PATTERN = 'SSSL'  # knob: choice L SL SSSL
TIED = True  # knob: choice True False
BATCH = 32  # knob: log 8 128
UNMARKED = 3  # not a knob

def main():
    LOCAL = 4  # knob: int 2 8
'''


def values(train_py: str, device: str = "cpu") -> dict[str, object]:
    return {knob.name: knob.value for knob in parse(train_py, device)}


def test_marks_are_read() -> None:
    on_cpu = {k.name: (k.kind, k.value, k.low, k.high) for k in parse(TRAIN, "cpu")}
    assert on_cpu["MATRIX_LR"] == ("log", 0.04, 0.01, 0.16)
    assert on_cpu["MOMENTUM"] == ("lin", 0.95, 0.8, 0.99)
    assert on_cpu["DEPTH"] == ("int", 4, 2, 8)
    assert set(on_cpu) == {"MATRIX_LR", "MOMENTUM", "DEPTH", "PATTERN", "TIED", "BATCH"}
    assert "WIDTH" in values(TRAIN, "cuda") and "DEPTH" not in values(TRAIN, "cuda")


def test_only_the_literals_change() -> None:
    turned = replace(TRAIN, parse(TRAIN, "cpu"), {"MATRIX_LR": 0.0512, "PATTERN": "SL", "TIED": False, "DEPTH": 5})
    before, after = TRAIN.splitlines(), turned.splitlines()
    assert [(b, a) for b, a in zip(before, after, strict=True) if a != b] == [
        ("MATRIX_LR = 0.04  # knob: log 0.01 0.16", "MATRIX_LR = 0.0512  # knob: log 0.01 0.16"),
        ("DEPTH = 4  # knob[cpu]: int 2 8", "DEPTH = 5  # knob[cpu]: int 2 8"),
        ("PATTERN = 'SSSL'  # knob: choice L SL SSSL", "PATTERN = 'SL'  # knob: choice L SL SSSL"),
        ("TIED = True  # knob: choice True False", "TIED = False  # knob: choice True False"),
    ]


@pytest.mark.parametrize(("line", "words"), [
    ("A = 1  # knob: logg 1 2", "none of log, lin, int, choice"),
    ("A = 1  # knob: int 1", "two numbers"),
    ("A = 1  # knob: int one two", "two numbers"),
    ("A = 0.5  # knob: log 0 1", "cannot go from 0 to 1"),
    ("A = 4  # knob: int 4 4", "cannot go"),
    ("A = 4  # knob: lin 0.5 9", "write it with a point"),
    ("A = 0.5  # knob: int 0 9", "does not fit 0.5"),
    ("A = True  # knob: lin 0 1", "does not fit True"),
    ("A = 1  # knob: choice 1", "two or more"),
    ("A = 1 + B  # knob: int 1 2", "no literal"),
    ("A = (1)  # knob: int 1 2", "cannot be read"),
    ("A = 1  # knob int 1 2", "cannot be read"),
    ("A = 1  # knob[tpu]: int 1 2", "neither"),
    ("A = 1  # knob: int 1 2\nA = 2  # knob: int 1 2", "marked twice"),
])
def test_a_mark_that_cannot_be_understood_stops_with_its_line(line: str, words: str) -> None:
    with pytest.raises(Stop, match=words) as caught:
        parse("import math\n\n" + line, "cpu")
    assert "train.py line " in str(caught.value) and "knob: log 0.01 0.16" in str(caught.value)


def test_a_value_outside_its_range_widens_it() -> None:
    (knob,) = parse("A = 9  # knob: int 2 8\n", "cpu")
    assert (knob.low, knob.high) == (2, 9)


NAMES = st.from_regex(r"[A-Z][A-Z_]{0,5}", fullmatch=True)
NUMBERS = st.floats(1e-6, 1e6, allow_nan=False).map(lambda x: float(f"{x:.3g}"))


@st.composite
def marked_lines(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["log", "lin", "int", "choice", "none"]))
    name, space = draw(NAMES), draw(st.sampled_from(["", " ", "   "]))
    end = draw(st.sampled_from(["\n", "\r\n", " ; and a word\n", "  # more\n"]))
    if kind == "none":
        odd = f"{name} = 'ä\x0c \u2028'  # knobs\n"
        return draw(st.sampled_from([f"# {name} = 1\n", odd, "\n", "if True:\n    X = 1\n"]))
    if kind == "choice":
        words = draw(st.lists(st.sampled_from(["1", "2.5", "True", "None", "'a'", "bc"]), min_size=2, unique=True))
        value = draw(st.sampled_from(["1", "True", "'a'", '"bc"', "r'x'"]))
        return f"{name}{space}={space}{value}{space}# knob: choice {' '.join(words)}{end}"
    if kind == "int":
        least = draw(st.integers(-50, 50))
        return f"{name}{space}={space}{least + 3}{space}# knob: int {least} {least + draw(st.integers(4, 99))}{end}"
    low, high = sorted([draw(NUMBERS), draw(NUMBERS)])
    return f"{name}{space}={space}{low!r}{space}# knob: {kind} {low!r} {high * 2!r}{end}"


@settings(deadline=None)
@given(st.lists(marked_lines(), max_size=8), st.randoms(use_true_random=False))
def test_replace_changes_marked_literals_and_nothing_else(lines: list[str], dice: random.Random) -> None:
    text = "".join(lines)
    try:
        knobs = parse(text, "cpu")
    except Stop as stop:
        assert "marked twice" in str(stop)
        return
    assert replace(text, knobs, {k.name: k.value for k in knobs}) == text
    new = {k.name: k.decode(dice.random()) for k in knobs}
    turned = replace(text, knobs, new)
    by_line = {k.line: k for k in knobs}
    for number, (old, now) in enumerate(zip(split_lines(text), split_lines(turned), strict=True)):
        if number not in by_line:
            assert old == now
            continue
        knob = by_line[number]
        assert now.startswith(old[:knob.start]) and now.endswith(old[knob.end:])
        literal = ast.literal_eval(now[knob.start:len(now) - len(old[knob.end:])])
        assert (type(literal), literal) == (type(new[knob.name]), new[knob.name])
    assert {k.name: k.value for k in parse(turned, "cpu")} == new


@settings(deadline=None)
@given(st.sampled_from(parse(TRAIN, "cpu")), st.floats(0, 1))
def test_encode_and_decode_agree(knob: Knob, x: float) -> None:
    value = knob.decode(x)
    assert type(value) is type(knob.value)
    if knob.kind != "choice":
        assert isinstance(value, int | float) and knob.low <= value <= knob.high
    assert knob.decode(knob.encode(value)) == value


def loss(found: dict[str, object]) -> float:
    """A quadratic in the units of the ranges, best at MATRIX_LR 0.02, MOMENTUM 0.85, DEPTH 7."""
    lr, momentum, depth, batch = (float(str(found[k])) for k in ("MATRIX_LR", "MOMENTUM", "DEPTH", "BATCH"))
    return (math.log(lr / 0.02) ** 2 / 8 + ((momentum - 0.85) / 0.19) ** 2 + ((depth - 7) / 6) ** 2
            + math.log(batch / 64) ** 2 / 8)


def night(rounds: int, seed: int, restart: bool = False, lost: tuple[int, ...] = ()) -> list[Proposal]:
    """A simulated night: what is proposed, scored by `loss`, the incumbent moving with every improvement.

    Asks in `lost` are taken but never finish; ask 3 crashes; with `restart` every proposal comes from a new process.
    """
    proposer, incumbent, best, parent = Knobs("cpu", Path("/nonexistent")), TRAIN, loss(values(TRAIN)), 0
    history: list[Past] = []
    proposals: list[Proposal] = []
    for asked in range(rounds):
        task = Task("candidate", asked + 1, parent=parent)
        brief = briefs.build(load(), task, "", incumbent, history, asked=asked, night_seed=seed)
        if restart:
            proposer = Knobs("cpu", Path("/nonexistent"))
            proposer._first = TRAIN
        proposal = proposer.propose(brief)
        assert proposal is not None
        proposals.append(proposal)
        if asked in lost:
            continue
        score = None if asked == 3 else loss(values(proposal.train_py))
        history.append(Past(asked + 1, "candidate", "discard", proposal.title, proposal.family, "knobs",
                            lint.blob(proposal.train_py), score, None))
        if score is not None and score < best:
            incumbent, best, parent = proposal.train_py, score, asked + 1
    return proposals


def test_the_search_finds_a_quadratic_better_than_chance() -> None:
    knobs = parse(TRAIN, "cpu")
    by_search, by_chance = [], []
    for seed in range(4):
        found = [loss(values(p.train_py)) for p in night(90, seed)]
        assert sum(found[-12:]) < 0.25 * sum(found[:12])
        by_search.append(min(found))
        dice = random.Random(seed)
        by_chance.append(min(loss({k.name: k.decode(dice.random()) for k in knobs}) for _ in range(90)))
    assert sum(by_search) < 0.5 * sum(by_chance), (by_search, by_chance)


def test_the_first_step_is_small_and_around_the_current_values() -> None:
    first = {k.name: k for k in parse(TRAIN, "cpu")}
    steps = [k.encode(k.value) - first[k.name].encode(first[k.name].value)
             for p in night(6, 1) for k in parse(p.train_py, "cpu") if k.name == "MATRIX_LR"]
    assert all(abs(step) < 4 * FIRST_STEP for step in steps) and len(set(steps)) == 6


def test_a_resumed_night_proposes_the_same() -> None:
    straight = night(40, 7, lost=(5, 17))
    assert straight == night(40, 7, restart=True, lost=(5, 17))
    assert straight[:20] == night(20, 7, lost=(5, 17))
    assert [p.train_py for p in straight] != [p.train_py for p in night(40, 8, lost=(5, 17))]
    assert len({p.train_py for p in straight}) == 40


def test_a_lost_ask_leaves_the_others_their_own_scores() -> None:
    """The search after a generation with a gap is the search told by hand, without the lost ask."""
    knobs = parse(TRAIN, "cpu")
    told = {k: float(k) for k in range(8) if k not in (2, 4)}
    asks = draws(knobs, 3, told)
    generations = [next(asks)[1] for _ in range(9)]
    assert generations == [0] * 8 + [1]


def test_the_first_values_are_found_in_git_after_a_keep(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    blob = subprocess.run(["git", "-C", str(tmp_path), "hash-object", "-w", "--stdin"], input=TRAIN, text=True,
                          check=True, capture_output=True).stdout.strip()
    kept = TRAIN.replace("0.04", "0.15")
    history = [Past(1, "baseline", "keep", "baseline", "", "", blob, 1.0, None)]
    brief = briefs.build(load(), Task("candidate", 2, parent=2), "", kept, history, asked=1, night_seed=5)
    unmoved = briefs.build(load(), Task("candidate", 2), "", TRAIN, history, asked=1, night_seed=5)
    here, there = Knobs("cpu", tmp_path).propose(brief), Knobs("cpu", tmp_path).propose(unmoved)
    assert here is not None and there is not None
    assert values(here.train_py) == values(there.train_py)
    assert "MATRIX_LR 0.15→" in here.title


def test_a_small_space_is_searched_to_its_end() -> None:
    text = "A = 1  # knob: choice 1 2 3\nB = 'x'  # knob: choice x y\n"
    seen = []
    for asked in range(7):
        brief = briefs.build(load(), Task("candidate", asked), "", text, [], asked=asked)
        proposal = Knobs("cpu", Path("/nonexistent")).propose(brief)
        if proposal is None:
            break
        seen.append(proposal.train_py)
    assert len(seen) == len(set(seen)) == 5 and text not in seen


def test_no_knob_stops_with_the_syntax() -> None:
    brief = briefs.build(load(), Task("candidate", 1), "", "WIDTH = 768  # knob[cuda]: int 512 1024\n", [])
    with pytest.raises(Stop, match=r"no knob for cpu .*# knob: log 0.01 0.16"):
        Knobs("cpu", Path("/nonexistent")).propose(brief)


def test_the_title_names_what_moved_most() -> None:
    for proposal in night(12, 2):
        parts = proposal.title.split(", ")
        assert 1 <= len(parts) <= 3
        for part in parts:
            name, _, move = part.partition(" ")
            old, new = move.split("→")
            assert old != new and f"{name} = {new}" in proposal.train_py.replace(": float", "")
