"""The night's state, as a fold over its journal, and results.tsv, as a view of all nights' states.

    night     a night begins: what it is run under, and on what
    leg       a loop takes it up, under limits of its own
    reserve   a call to a paid API is about to be made, at worst so dear;  settle  what it cost
    propose   a proposal is there;  drop  it conflicts with the incumbent that came after it
    exhausted the proposer has nothing more to propose in this leg
    start     a run is about to be made;  decide  what became of it, and what that means for the branch
    claim     the night's claims, or why there are none: the night is over
    stop      a leg ends
"""

from __future__ import annotations

import os
import unicodedata
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from nightshift.journal import Event, parse
from nightshift.values import Belief, Kind, Past, Score, SplitScore, Status, Stop

FIELDS = ["commit", "val_bpb", "memory_gb", "status", "description"]  # the field's own
OURS = ["night", "number", "kind", "parent", "seed", "delta", "p_better", "val_loss", "steps", "tokens_M", "train_s"]
COLUMNS = [*FIELDS, *OURS, "total_s", "usd", "proposer", "profile", "device"]
OBEYED = ("Cc", "Cf", "Cs")  # Unicode categories: control, format (bidirectional overrides among them), surrogate
RAN = ("keep", "discard")  # statuses of runs that have a score


@dataclass(frozen=True)
class Drafted:
    """A proposal as the journal holds it."""

    id: int
    title: str
    hypothesis: str
    family: str
    proposer: str
    blob: str
    parent_blob: str
    usd: float
    expected_delta: float | None
    rejected: str = ""  # where there is nothing to run: why


@dataclass(frozen=True)
class Row:
    """One run: what was started and, once `status` is set, what became of it."""

    number: int
    kind: Kind
    parent: int
    seed: int
    attempt: int
    arm: str
    length: float
    blob: str
    parent_blob: str
    commit: str
    title: str
    hypothesis: str
    family: str
    proposer: str
    usd: float
    proposal: int
    at: float
    rejected: str = ""  # of a proposal with nothing to run: why
    status: Status | None = None
    reason: str = ""
    counts: bool = True  # False where the run was repeated without regard to its score
    scores: dict[str, SplitScore] = field(default_factory=dict)
    score: float | None = None
    delta: float | None = None
    p_better: float | None = None
    taken_back_by: int = 0
    memory_mb: float = 0.0
    steps: int = 0
    tokens: int = 0
    num_params: int = 0
    flops_per_token: float = 0.0
    train_s: float = 0.0
    startup_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class Incumbent:
    """A train.py that leads or led: the night's first, or a keep."""

    number: int  # of the run that made it; 0 for the night's first
    blob: str
    commit: str  # on the night's branch
    belief: Belief | None
    length: float = 1.0
    sentinels: int = 0  # checks since it was kept


@dataclass
class State:
    """Everything that is known of a night. `apply` is the only thing that changes it."""

    night: Event = field(default_factory=dict)
    leg: Event = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    stack: list[Incumbent] = field(default_factory=list)
    running: Row | None = None
    again: Row | None = None  # a run that did not count and is to be repeated
    drafted: dict[int, Drafted] = field(default_factory=dict)  # not started yet
    asked: int = 0
    exhausted: str = ""
    claim: Event | None = None
    stopped: Event | None = None
    tip: str = ""  # where the night's branch is to stand
    tip_before: str = ""  # where it stood before the last move, which a kill may have prevented
    _calls: dict[str, float] = field(default_factory=dict)

    @property
    def incumbent(self) -> Incumbent:
        return self.stack[-1]

    @property
    def keeps(self) -> list[Incumbent]:
        """The keeps that stand, oldest first."""
        return self.stack[1:]

    @property
    def rules(self) -> dict[str, Any]:
        """The config that the night was begun under."""
        return cast(dict[str, Any], self.night["config"])

    @property
    def over(self) -> bool:
        """Whether its claims, or why there are none, are in the journal."""
        return self.claim is not None

    @property
    def closed(self) -> bool:
        """Whether there is nothing left to do, the publishing included."""
        return self.over and self.stopped is not None

    @property
    def usd(self) -> float:
        """Spent so far; a reservation without an answer counts in full."""
        return sum(self._calls.values())

    @property
    def calls(self) -> int:
        """Calls to paid APIs so far."""
        return len(self._calls)

    @property
    def number(self) -> int:
        """Of the next run."""
        return len(self.rows) + 1

    def of(self, *kinds: Kind) -> list[Row]:
        """Finished runs of these kinds that count."""
        return [r for r in self.rows if r.kind in kinds and r.counts]

    def scored(self, *kinds: Kind) -> list[Row]:
        """Those of them that have a score."""
        return [r for r in self.of(*kinds) if r.status in RAN and r.score is not None]

    def history(self) -> tuple[Past, ...]:
        """The night as proposers are told it: what counts."""
        return tuple(
            Past(r.number, r.kind, r.status, r.title, r.family, r.proposer, r.blob, r.score, r.delta, r.reason)
            for r in self.rows
            if r.status is not None and r.counts
        )

    def apply(self, event: Event) -> None:
        """One transition further. An event that this version does not know is a Stop."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is None:
            raise Stop(f"the journal has an event {event['event']!r} that this version of nightshift does not know")
        handler(event)

    def _on_night(self, event: Event) -> None:
        self.night = event
        self.stack = [Incumbent(0, event["blob"], event["base"], None)]
        self.tip = self.tip_before = event["base"]

    def _on_leg(self, event: Event) -> None:
        self.leg, self.exhausted, self.stopped = event, "", None

    def _on_reserve(self, event: Event) -> None:
        self._calls[event["call"]] = event["usd"]

    def _on_settle(self, event: Event) -> None:
        self._calls[event["call"]] = event["usd"]

    def _on_propose(self, event: Event) -> None:
        self.asked += 1
        names = Drafted.__dataclass_fields__
        self.drafted[event["id"]] = Drafted(**{k: v for k, v in event.items() if k in names})

    def _on_drop(self, event: Event) -> None:
        del self.drafted[event["id"]]

    def _on_exhausted(self, event: Event) -> None:
        self.exhausted = event["why"]

    def _on_start(self, event: Event) -> None:
        names = Row.__dataclass_fields__
        self.running = Row(**{k: v for k, v in event.items() if k in names})
        self.drafted.pop(self.running.proposal, None)
        self.again = None

    def _on_decide(self, event: Event) -> None:
        assert self.running is not None
        names = Row.__dataclass_fields__
        known = {k: v for k, v in event.items() if k in names and k != "at"}
        known["scores"] = {k: SplitScore(**v) for k, v in event.get("scores", {}).items()}
        row = replace(self.running, **known, counts=event["repeat_length"] is None)
        self.rows.append(row)
        self.running = None
        self.again = replace(row, length=event["repeat_length"]) if not row.counts else None
        self._move(row, event)

    def _move(self, row: Row, event: Event) -> None:
        """The incumbents after a decision: a keep is laid on top, a keep that is taken back comes off."""
        age = event["age"]
        self.stack = [_aged(i, age) for i in self.stack[:-1]] + self.stack[-1:]
        belief = Belief(**event["belief"]) if event["belief"] else None
        if row.kind == "candidate" and row.status == "keep":
            self.stack[-1] = _aged(self.stack[-1], age)
            self.stack.append(Incumbent(row.number, row.blob, event["moves_to"], belief, row.length))
        else:
            if event["takes_back"]:
                self.stack.pop()
                back = event["takes_back"]
                taken = replace(self.rows[back - 1], status="discard", taken_back_by=row.number)
                self.rows[back - 1] = taken
            checks = int(row.kind == "sentinel" and row.counts and row.status in RAN and not event["takes_back"])
            top = self.stack[-1]
            self.stack[-1] = replace(top, belief=belief or top.belief, sentinels=top.sentinels + checks)
        if event["moves_to"]:
            self.tip_before, self.tip = self.tip, event["moves_to"]

    def _on_claim(self, event: Event) -> None:
        self.claim = event

    def _on_stop(self, event: Event) -> None:
        self.stopped = event
        if event["moves_to"]:
            self.tip = self.tip_before = event["moves_to"]


def _aged(incumbent: Incumbent, age: float) -> Incumbent:
    b = incumbent.belief
    return incumbent if b is None else replace(incumbent, belief=Belief(b.m, b.s2 + age))


def fold(events: list[Event]) -> State:
    """The state after these events."""
    state = State()
    for event in events:
        state.apply(event)
    return state


def journals(root: Path) -> dict[str, Path]:
    """Tag → journal of every night: the live one in .nightshift/ where there is one, else the published one."""
    found = {p.parent.name: p for p in sorted((root / "experiments").glob("*/journal.jsonl"))}
    return found | {p.parent.name: p for p in sorted((root / ".nightshift").glob("*/journal.jsonl"))}


def nights(root: Path) -> list[State]:
    """All nights that this checkout knows of, oldest first."""
    states = [fold(parse(path.read_bytes(), str(path))[0]) for path in journals(root).values()]
    return sorted((s for s in states if s.night), key=lambda s: s.night["at"])


def results_tsv(states: list[State]) -> str:
    """The ledger as people read it: a line a run, across nights."""
    lines = ["\t".join(COLUMNS)]
    lines += ["\t".join(_cells(s, row)) for s in states for row in s.rows]
    return "\n".join(lines) + "\n"


def _cells(state: State, row: Row) -> list[str]:
    val = row.scores.get("val") if row.status in RAN else None
    values: dict[str, Any] = {
        "commit": row.commit[:7],
        "val_bpb": f"{val.bpb if val else 0:.6f}",
        "memory_gb": f"{row.memory_mb / 1024 if val else 0:.1f}",
        "status": row.status,
        "description": description(row),
        "night": state.night["tag"],
        "number": row.number,
        "kind": row.kind,
        "parent": row.parent,
        "seed": row.seed,
        "delta": "" if row.delta is None else f"{row.delta:+.6f}",
        "p_better": "" if row.p_better is None else f"{row.p_better:.3f}",
        "val_loss": f"{val.loss:.6f}" if val else "",
        "steps": row.steps,
        "tokens_M": f"{row.tokens / 1e6:.1f}",
        "train_s": f"{row.train_s:.1f}",
        "total_s": f"{row.total_s:.1f}",
        "usd": f"{row.usd:.4f}",
        "proposer": row.proposer,
        "profile": state.night["config"]["profile"],
        "device": state.night["device"],
    }
    return [" ".join(str(values[c]).split()) for c in COLUMNS]


def description(row: Row) -> str:
    """What a row is, in one line."""
    text = row.title
    if row.taken_back_by:
        text += f" (taken back by sentinel {row.taken_back_by})"
    elif row.reason and row.reason != row.title and (row.status not in RAN or not row.counts):
        text += f" ({row.reason.splitlines()[0][:160]})"
    return clean(text)


def clean(text: str) -> str:
    """`text` as one line that a terminal can only show: white space as single spaces, nothing that is obeyed."""
    kept = (" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in OBEYED)
    return " ".join("".join(kept).split())


def write_atomically(path: Path, text: str) -> None:
    """The old content or the new, never a part. OSError becomes a Stop: the journal holds all that the file would."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise Stop(
            f"{path}: {error.strerror}; the journal is whole, and this file comes back from it. "
            "Mend that, then: python loop.py run"
        ) from None


def score_fields(score: Score) -> dict[str, Any]:
    """A score as a decide event holds it."""
    return {"scores": {name: asdict(split) for name, split in score.splits.items()}, "train_s": score.train_s}
