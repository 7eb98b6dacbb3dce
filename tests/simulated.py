"""Nights of draws: the events, ledger and decisions are the real ones, and a normal draw stands for a training run.

A train.py is the path of changes that led to it ("first/3/7" as its blob), and its true score is the sum of their
effects. A run's noise is a function of its seed, as a real run's is, so a run that a kill cut off scores the same
when it is made again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from nightshift import config as configuration
from nightshift import decide, ledger
from nightshift.journal import Event
from nightshift.ledger import Drafted, Row, State
from nightshift.night import STARTED
from nightshift.values import Belief, Candidate, Decision, Reject, Run, Score, SplitScore, Task

FIRST, BASE = "first", 1.0  # the night's first train.py, and its true score in bits per byte
BYTES = 1_000_000
TOKENS = 250_000
SIGMA0 = 0.003
CRASH = Reject("crash", "boom")


class Book(Protocol):
    """night.Ledger, or a Sheet."""

    state: State

    def write(self, event: str, /, **fields: Any) -> None: ...


class Sheet:
    """Events and their fold without a disk, for nights by the hundred."""

    def __init__(self, events: list[Event] | None = None) -> None:
        self.events = list(events or [])
        self.state = ledger.fold(self.events)

    def write(self, event: str, /, **fields: Any) -> None:
        self.events.append({"n": len(self.events) + 1, "at": float(len(self.events)), "event": event, **fields})
        self.state.apply(self.events[-1])


@dataclass(frozen=True)
class World:
    """What is true of the machine and of the changes that will be proposed. Scores are bits per byte."""

    seed: int = 0
    sigma: float = 0.003
    effect: Callable[[int], float] = lambda proposal: 0.0
    lines: Callable[[int], int] = lambda proposal: 0  # net lines that a proposal adds
    fate: Callable[[int], str] = lambda seed: ""  # of a run, by its seed: "crash", "unhealthy" or nothing special
    offsets: tuple[float, ...] = ()  # what the machine adds to a score, by the run's number

    def truth(self, blob: str) -> float:
        return BASE + sum(self.effect(int(proposal)) for proposal in blob.split("/")[1:])

    def score(self, seed: int, blob: str, splits: tuple[str, ...], number: int) -> Score:
        offset = self.offsets[number] if self.offsets else 0.0
        noise = {s: random.Random(f"{self.seed}:{seed}:{s}").gauss(0.0, self.sigma) for s in splits}
        return Score({s: split(self.truth(blob) + offset + noise[s]) for s in splits}, 8.0)


def split(bpb: float, loss: float | None = None) -> SplitScore:
    """A SplitScore of so many bits per byte, or of so many nats a token."""
    return SplitScore(bpb * math.log(2) * BYTES if loss is None else loss * TOKENS, BYTES, TOKENS)


@cache
def demo(**settings: Any) -> configuration.Config:
    """The demo profile with these settings."""
    return configuration.load(profile="demo", **settings)


def begin(
    book: Book, seed: int = 0, prior: tuple[float, int] = (0.0, 0), tag: str = "nov20", **settings: Any
) -> None:
    """A night's first events; `settings` are keys of config.yaml."""
    config = demo(**settings)
    book.write(
        "night",
        tag=tag,
        base="c-first",
        blob=FIRST,
        config=config.as_dict(),
        seed=seed,
        claim_n=decide.claim_runs(config.max_experiments, config.max_hours, config.budget_s, config.claim_per_arm),
        sigma0=config.sigma0,
        prior={"ss": prior[0], "df": prior[1]},
        device="a CPU",
        data_digest="digest",
        torch="2.13.0",
        profile="demo",
    )
    limits = {name: getattr(config, name) for name in ("max_experiments", "max_hours", "max_usd")}
    book.write("leg", pid=1, sandbox="none", limits=limits, proposer="knobs")


def draft(book: Book, title: str = "", **fields: Any) -> None:
    """A proposal against the incumbent of now."""
    number, parent = book.state.asked + 1, book.state.incumbent.blob
    known = {"hypothesis": "", "family": "", "proposer": "knobs", "usd": 0.0, "expected_delta": None, "tokens": 0}
    names = {"id": number, "parent_blob": parent, "blob": f"{parent}/{number}", "title": title or f"change {number}"}
    book.write("propose", **known | names | {"rejected": ""} | fields)


def drafted_for(state: State, task: Task) -> Drafted:
    """What `task` runs: a proposal that waits, the run that is made again, or a train.py as it is."""
    before = state.running or (state.again if task.again else None)
    if before:
        same = {k: v for k, v in asdict(before).items() if k in Drafted.__dataclass_fields__}
        return Drafted(**same, id=before.proposal, expected_delta=None)
    if task.kind == "candidate":
        return next(iter(state.drafted.values()))
    return Drafted(0, task.kind, "", "", "", task.blob, state.incumbent.blob, 0.0, None)


def start(book: Book, task: Task) -> Drafted:
    """The start event, as Night.commit writes it."""
    drafted = drafted_for(book.state, task)
    told = {k: v for k, v in asdict(drafted).items() if k in Row.__dataclass_fields__}
    names = {name: getattr(task, name) for name in STARTED}
    book.write("start", **names, **told, proposal=drafted.id, commit=f"candidate-{task.number}")
    return drafted


def record(book: Book, decision: Decision, score: Score | None = None, total_s: float = 10.0) -> None:
    """The decide event, as Night.record writes it."""
    row = book.state.running
    assert row is not None
    outcome = asdict(decision)
    outcome["repeat_length"] = outcome.pop("length")
    moves_to = ""
    if decision.takes_back:
        moves_to = f"revert-{decision.takes_back}"
    elif row.kind == "candidate" and decision.status == "keep":
        moves_to = f"keep-{row.number}"
    commit = moves_to if row.kind == "candidate" and moves_to else row.commit
    measured = ledger.score_fields(score) | {"steps": 7, "memory_mb": 512.0} if score else {"scores": {}}
    book.write("decide", number=row.number, **outcome, **measured, commit=commit, moves_to=moves_to, total_s=total_s)


def judged(state: State, task: Task, score: Score, net_added: int = 0, unhealthy: str = "") -> Decision:
    """decide.judge on a run that left nothing but a score."""
    candidate = Candidate(task, "", task.blob, "", Path(), net_added)
    run = Run(candidate, Path(), 7, 7000, 1.0, score.train_s, 512.0, 1000, 6000.0, unhealthy)
    return decide.judge(state, task, run, score, net_added)


def play(
    book: Book, score: Score | Reject, net_added: int = 0, unhealthy: str = "", total_s: float = 10.0
) -> Decision:
    """Whatever comes next, with this outcome."""
    task = decide.next(book.state, 0.0)
    if task.kind == "candidate" and task.attempt == 1 and not task.again and not book.state.drafted:
        draft(book)
    start(book, task)
    if isinstance(score, Reject):
        decision = decide.reject(book.state, score)
        record(book, decision, total_s=total_s)
    else:
        decision = judged(book.state, task, score, net_added, unhealthy)
        record(book, decision, score, total_s)
    return decision


def scored(bpb: float, **others: float) -> Score:
    """A score of `bpb` on val, and on other splits as named."""
    return Score({"val": split(bpb)} | {name: split(y) for name, y in others.items()}, 8.0)


def night(*baselines: float, **rules: Any) -> Sheet:
    """A night of these baselines; 110 candidates at most, and no limit of time."""
    sheet = Sheet()
    begin(sheet, **{"max_experiments": 110, "sigma0": SIGMA0, "baselines": len(baselines)} | rules)
    for bpb in baselines:
        play(sheet, scored(bpb))
    return sheet


def believed(state: State) -> Belief:
    """What is believed of the incumbent."""
    belief = state.incumbent.belief
    assert belief is not None
    return belief


def live(book: Book, world: World) -> Iterator[None]:
    """The night from where it stands to its end; yields after every event, for that is where a kill may come."""
    while (task := decide.next(book.state, 0.0)).kind != "end":
        if task.kind == "candidate" and task.attempt == 1 and not task.again and not book.state.drafted:
            draft(book)
            yield
        drafted = start(book, task)
        yield
        fate = world.fate(task.seed)
        if fate == "crash":
            record(book, decide.reject(book.state, Reject("crash", "boom\nTraceback")))
        else:
            score = world.score(task.seed, drafted.blob, task.splits, task.number)
            decision = judged(book.state, task, score, world.lines(drafted.id), fate)
            record(book, decision, score)
        yield
    if not book.state.over:
        book.write("claim", **decide.claim(book.state, task.why))
        yield


def whole(book: Book, world: World) -> State:
    """The night, lived to its end."""
    for _ in live(book, world):
        pass
    return book.state
