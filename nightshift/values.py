"""The values that travel through a night, in the order in which they travel.

    Task → Brief → Proposal → Candidate → Run → Score → Decision

`decide.next` makes a Task; a proposer turns its Brief into a Proposal; `branch` commits it as a
Candidate; `runner` trains it into a Run; `scorer` turns the weights into a Score; `decide.judge`
turns the score into a Decision, which `ledger` records and `branch` carries out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["baseline", "candidate", "sentinel", "claim", "end"]
Status = Literal["keep", "discard", "crash", "timeout", "invalid"]


class Retry(Exception):
    """Something outside failed in a way that time mends; `after` is how many seconds to wait first."""

    def __init__(self, message: str, after: float) -> None:
        super().__init__(message)
        self.after = after


class Reject(Exception):
    """This candidate is over, the night is not. `status` is crash, timeout or invalid."""

    def __init__(self, status: Literal["crash", "timeout", "invalid"], message: str) -> None:
        super().__init__(message)
        self.status = status


class Stop(Exception):
    """The night cannot go on. The message says what happened, what it means, and the next command."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Task:
    """What the night does next. A candidate starts from `blob` and edits it; every other kind runs it as it is."""

    kind: Kind
    number: int = 0  # of the run within its night, from 1
    attempt: int = 1  # more than 1 where an earlier attempt was cut off
    seed: int = 0
    parent: int = 0  # number of the run that made the incumbent; 0 is the train.py the night began with
    blob: str = ""  # git blob of the incumbent's train.py, or of the one to run again
    arm: str = ""  # of a claim: "final" or "first"
    splits: tuple[str, ...] = ("val",)
    length: float = 1.0  # times the total_steps that train.py asks for; for time_to_target
    again: bool = False  # the last run did not count: the same train.py once more
    why: str = ""  # of an end: the cause, in words


@dataclass(frozen=True)
class Past:
    """One finished run, as later proposals learn from it. Scores are lower-is-better; None where it failed."""

    number: int
    kind: Kind
    status: Status
    title: str
    family: str
    proposer: str
    blob: str
    score: float | None
    delta: float | None
    reason: str = ""  # of a failure: what happened, and the last lines of its log (quoted data, never instructions)


@dataclass(frozen=True)
class Brief:
    """All that a proposer is told: `text` for a language model, the rest, typed, for an optimiser."""

    task: Task
    program: str  # program.md as it stands now
    train_py: str  # the incumbent's train.py, which a proposal edits
    history: tuple[Past, ...]
    text: str  # program.md, train.py and the ledger's digest, as one prompt
    drafted: tuple[str, ...] = ()  # titles of proposals that are drawn up or training, their score not known yet
    asked: int = 0  # proposals that this night has taken so far, whatever became of them
    night_seed: int = 0  # for a proposer's own dice


@dataclass(frozen=True)
class Proposal:
    """One idea: the whole text of the new train.py, and why it should help."""

    title: str
    hypothesis: str
    train_py: str
    proposer: str
    family: str = ""
    expected_delta: float | None = None  # in the score's units, negative is better
    tokens: int = 0
    usd: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A train.py that is in git and about to run."""

    task: Task
    title: str
    blob: str
    commit: str  # under refs/nightshift/<tag>/<number>
    folder: Path  # the run's own: train.py as committed, run.log, weights.safetensors
    net_added: int = 0  # lines added less lines deleted against the incumbent


@dataclass(frozen=True)
class Run:
    """A training run that reached its end. Times are seconds on the runner's clock."""

    candidate: Candidate
    weights: Path
    steps: int
    tokens: int
    startup_s: float  # process start to the first batch: off the budget
    train_s: float  # first batch to finish
    peak_memory_mb: float
    num_params: int
    flops_per_token: float
    unhealthy: str = ""  # what was wrong with the device meanwhile, if anything


@dataclass(frozen=True)
class SplitScore:
    """Sums over one held-out split. Special tokens have no bytes and are not scored."""

    nats: float
    bytes: int
    tokens: int

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


@dataclass(frozen=True)
class Score:
    """What the scorer measured, by split, and the clock that goes with it in a time_to_target night."""

    splits: dict[str, SplitScore]
    train_s: float


@dataclass(frozen=True)
class Belief:
    """What is believed of a train.py's true score: normal with mean `m` and variance `s2`."""

    m: float
    s2: float


@dataclass(frozen=True)
class Decision:
    """What becomes of a run. `belief` is the one about the incumbent after it."""

    status: Status
    score: float | None = None  # the steering score that was judged, lower is better
    delta: float | None = None  # against the belief about the incumbent; negative is better
    p_better: float | None = None
    belief: Belief | None = None
    age: float = 0.0  # variance that the run's turn adds to the beliefs about the incumbent's ancestors
    takes_back: int = 0  # of a sentinel: the number of the keep that is reverted
    length: float | None = None  # where the run does not count and is to be repeated: with what length
    reason: str = ""
    audit: dict[str, Any] | None = None  # of a keep: audit.Findings
