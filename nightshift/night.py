"""One night, open for work: journal, branch, scorer, proposer and folders, and the small steps that the loop names."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nightshift import brief, decide, ledger, lint
from nightshift.branch import Branch
from nightshift.journal import Journal
from nightshift.ledger import Drafted, Row, State
from nightshift.proposers import Proposer
from nightshift.runner import Bench, Live
from nightshift.scorer import Scorer
from nightshift.values import Candidate, Decision, Proposal, Reject, Run, Score, Stop, Task
from nightshift.view import View

INTERRUPTED = threading.Event()  # set by the loop's signal handler
LOGS = {"train.py", "run.log", "server.log"}
RESULTS = {"weights.safetensors", "nats-val.npy"}
LOG_BYTES = 1 << 20
AUDIT_SHARE = 0.1  # of the time that a would-be keep has taken
STARTED = ("number", "kind", "attempt", "seed", "parent", "arm", "length")  # of a Task, what the journal keeps


class Ledger:
    """Journal and state, moving together; safe to write to from the proposer's thread."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.RLock()
        self.state = ledger.fold(journal.events)

    def write(self, event: str, /, **fields: Any) -> None:
        """Journal first, state after."""
        with self._lock:
            self.state.apply(self._journal.append(event, **fields))

    def reread(self) -> None:
        """The state anew from the journal, where an interrupt may have come between the one and the other."""
        self.state = ledger.fold(self._journal.events)


class Purse:
    """What a proposer may spend. A reservation is journaled before the call, and stands until it is settled."""

    def __init__(self, book: Ledger, max_usd: float | None) -> None:
        self._book, self._max_usd = book, max_usd
        self._lock = threading.Lock()

    def reserve(self, usd: float) -> str | None:
        """A call's id, or None where its worst case would pass --max-usd."""
        with self._lock:
            if self._max_usd is not None and self._book.state.usd + usd > self._max_usd:
                return None
            call = f"call-{self._book.state.calls + 1}"
            self._book.write("reserve", call=call, usd=usd)
            return call

    def settle(self, call: str, usd: float, detail: dict[str, Any]) -> None:
        """What the call really cost."""
        self._book.write("settle", call=call, usd=usd, detail=detail)


class Night:
    """What the loop works with. Every step journals before it acts, and can be taken again after a kill."""

    def __init__(
        self,
        root: Path,
        book: Ledger,
        branch: Branch,
        bench: Bench,
        scorer: Scorer,
        proposer: Proposer,
        halt: threading.Event,
        view: View,
    ) -> None:
        self.root, self.book, self.branch, self.bench = root, book, branch, bench
        self.scorer, self.proposer, self.halt, self.view = scorer, proposer, halt, view
        self.folder = folder_of(root, self.state.night["tag"])
        self._drafter = ThreadPoolExecutor(1, thread_name_prefix="proposer")
        self._draft: Future[bool] | None = None
        self._started = 0.0

    @property
    def state(self) -> State:
        return self.book.state

    def heed(self) -> None:
        """Raises the KeyboardInterrupt anew: Python drops one that is raised inside a finaliser."""
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt

    def watch(self, live: Live) -> None:
        """Shows how the run goes, and heeds an interrupt meanwhile."""
        self.heed()
        self.view.watch(live)

    # brief → proposal

    def propose(self, task: Task) -> Drafted | None:
        """What is to be run: a candidate's proposal, or None where there is none to be had; else train.py as it is."""
        self.heed()
        self._started = time.monotonic()
        if task.kind != "candidate" or task.attempt > 1 or task.again:
            return self._unchanged(task)
        self.branch.check(self.state.tip)
        while not self.state.drafted:
            self._draft = self._draft or self._drafter.submit(self._write_draft, task)
            draft, self._draft = self._draft, None
            if not draft.result():
                return None
        drafted = next(iter(self.state.drafted.values()))
        merged = self._onto_incumbent(drafted)
        if merged is None:
            self.book.write("drop", id=drafted.id, why="conflicts with the incumbent that came after it")
            return self.propose(task)
        if self.proposer.ahead and not self._last(task):
            self._draft = self._drafter.submit(self._write_draft, task, [drafted.title])
        return merged

    def _last(self, task: Task) -> bool:
        limit = self.state.leg["limits"]["max_experiments"]
        return limit is not None and len(self.state.of("candidate")) + 1 >= limit

    def _write_draft(self, task: Task, drafted: list[str] | None = None) -> bool:
        """Asks the proposer, and journals its answer at once: it may have been paid for. False: nothing more."""
        state = self.state
        parent = state.incumbent
        program = self._program()
        train_py = self.branch.read_blob(parent.blob).decode()
        told = brief.build(
            self.bench.config,
            task,
            program,
            train_py,
            state.history(),
            drafted or (),
            state.asked,
            state.night["seed"],
            state.night["device"],
            math.sqrt(decide.variance(state)),
        )
        number = state.asked + 1
        fields = {"id": number, "parent_blob": parent.blob}
        try:
            proposal = self.proposer.propose(told)
            blob = self.branch.write_blob(proposal.train_py) if proposal else ""
        except Reject as reason:
            title = str(reason).splitlines()[0]
            empty = Proposal(title, "", train_py, self.proposer.name)
            self.book.write("propose", **fields, **self._fields(empty), blob=parent.blob, rejected=str(reason))
            return True
        if proposal is None:
            self.book.write("exhausted", why=f"{self.proposer.name} has nothing more to propose")
            return False
        faults = "; ".join(lint.check(proposal.train_py))
        if proposal.train_py == train_py:
            faults = "it changes nothing"
        self.book.write("propose", **fields, **self._fields(proposal), blob=blob, rejected=faults)
        return True

    def _program(self) -> str:
        """program.md as it stands now. A person may be saving it at this very moment: a night does not end for that."""
        try:
            return (self.root / "program.md").read_text(errors="replace")
        except OSError as error:
            self.view.say(f"program.md: {error.strerror}; this proposal is drawn up without it")
            return ""

    @staticmethod
    def _fields(proposal: Proposal) -> dict[str, Any]:
        fields = asdict(proposal)
        del fields["train_py"]
        return fields

    def _onto_incumbent(self, drafted: Drafted) -> Drafted | None:
        """The proposal against the incumbent of now, merged three ways where that has moved; None: it conflicts."""
        now = self.state.incumbent.blob
        if drafted.rejected or now == drafted.parent_blob:
            return drafted
        text = self.branch.merge3(drafted.parent_blob, now, drafted.blob)
        if text is None:
            return None
        return Drafted(**{**asdict(drafted), "blob": self.branch.write_blob(text), "parent_blob": now})

    def _unchanged(self, task: Task) -> Drafted:
        if before := self.state.running or (self.state.again if task.again else None):
            names = Drafted.__dataclass_fields__
            same = {k: v for k, v in asdict(before).items() if k in names}
            paid = 0.0 if task.again else before.usd
            return Drafted(**(same | {"usd": paid}), id=before.proposal, expected_delta=None)
        title = {
            "baseline": "baseline: the unchanged train.py",
            "sentinel": f"sentinel: run {task.parent} again" if task.parent else "sentinel: the baseline again",
            "claim": f"claim: the {task.arm} train.py",
        }[task.kind]
        return Drafted(0, title, "", "", "", task.blob, self.state.incumbent.blob, 0.0, None)

    # score → decision

    def audited(self, decision: Decision, candidate: Candidate, run: Run) -> Decision:
        """The decision, once a would-be keep was found to predict each token from those before it. Reject where not."""
        if decision.status != "keep" or candidate.task.kind != "candidate":
            return decision
        others = [p for p in candidate.folder.parent.glob("*/nats-val.npy") if p.parent != candidate.folder]
        incumbent = max(others, key=lambda path: path.parent.name, default=None)
        seconds = max(1.0, AUDIT_SHARE * (time.monotonic() - self._started))
        with self.scorer.serve(candidate.folder / "train.py", candidate.folder) as server:
            return replace(decision, audit=server.audit(run.weights, incumbent, seconds))

    # proposal → candidate

    def commit(self, task: Task, drafted: Drafted) -> Candidate:
        """Commits the proposal under refs/nightshift/, journals that it starts, and lays out the run's folder."""
        at = time.time()
        parent = self.state.incumbent
        message = _message(drafted.title, drafted.hypothesis, {"night": self.state.night["tag"], "run": task.number})
        commit = parent.commit
        if drafted.blob != parent.blob:
            commit = self.branch.candidate(task.number, drafted.blob, parent.commit, message, at)
        self.book.write(
            "start",
            **{name: getattr(task, name) for name in STARTED},
            **{k: v for k, v in asdict(drafted).items() if k in Row.__dataclass_fields__},
            proposal=drafted.id,
            commit=commit,
        )
        if drafted.rejected:
            raise Reject("invalid", drafted.rejected)
        folder = self.folder / "runs" / f"{task.number:03d}"
        _wipe(folder)
        folder.mkdir(parents=True)
        (folder / "train.py").write_bytes(self.branch.read_blob(drafted.blob))
        net_added = self.branch.net_added(parent.blob, drafted.blob) if drafted.blob != parent.blob else 0
        candidate = Candidate(task, drafted.title, drafted.blob, commit, folder, net_added)
        self.view.starts(candidate, self.state)
        return candidate

    # decision → ledger, branch

    def record(self, decision: Decision, run: Run | None = None, score: Score | None = None) -> None:
        """Journals what became of the run in flight, and what the branch will do about it."""
        row = self.state.running
        assert row is not None
        keeps = row.kind == "candidate" and decision.status == "keep"
        incumbent = keeps or (row.kind == "baseline" and score is not None)
        self._tidy(row, incumbent)  # first: it may have filled the disk that the journal needs
        moves_to = self._moves_to(row, decision)
        measured: dict[str, Any] = {"scores": {}}
        if score is not None:
            measured = ledger.score_fields(score)
        if run is not None:
            names = ("steps", "tokens", "num_params", "flops_per_token", "startup_s")
            measured |= {name: getattr(run, name) for name in names} | {"memory_mb": run.peak_memory_mb}
        outcome = asdict(decision)
        outcome["repeat_length"] = outcome.pop("length")
        commit = moves_to if keeps else row.commit
        total_s = time.monotonic() - self._started
        moved = {"commit": commit, "moves_to": moves_to, "total_s": round(total_s, 3)}
        self.book.write("decide", number=row.number, **outcome, **measured, **moved)
        self.write_results()
        self.view.ended(self.state)

    def _moves_to(self, row: Row, decision: Decision) -> str:
        """The commit that the branch is to move to, made but not yet moved to; nothing for most runs."""
        tag, at = self.state.night["tag"], time.time()
        if row.kind == "candidate" and decision.status == "keep":
            assert decision.score is not None and decision.delta is not None and decision.p_better is not None
            facts = {
                "night": tag,
                "run": row.number,
                "score": f"{decision.score:.6f}",
                "delta": f"{decision.delta:+.6f}",
                "p_better": f"{decision.p_better:.3f}",
            }
            return self.branch.keep(row.blob, self.state.tip, _message(row.title, row.hypothesis, facts), at)
        if decision.takes_back:
            keep = self.state.rows[decision.takes_back - 1]
            facts = {"night": tag, "sentinel": row.number, "takes back": f"run {keep.number}, {keep.commit[:10]}"}
            message = _message(f'Revert "{keep.title}"', "It did not hold when measured again.", facts)
            return self.branch.revert(self.state.stack[-2].blob, self.state.tip, message, at)
        return ""

    def advance(self) -> None:
        """Moves the night's branch to where the journal says it stands; nothing to do for most runs."""
        if self.state.tip != self.state.tip_before:
            self.branch.advance(self.state.tip, self.state.tip_before)

    def write_results(self) -> None:
        """results.tsv, anew from all journals."""
        ledger.write_atomically(self.root / "results.tsv", ledger.results_tsv(ledger.nights(self.root)))

    def _tidy(self, row: Row, incumbent: bool) -> None:
        """Of a run's folder its train.py and logs stay, and of the newest incumbent weights and nats; the rest goes."""
        folder = self.folder / "runs" / f"{row.number:03d}"
        if not folder.is_dir():
            return
        if incumbent:
            for path in [*folder.parent.glob("*/weights.safetensors"), *folder.parent.glob("*/nats-*.npy")]:
                if path.parent != folder:
                    path.unlink()
        folder.chmod(0o700)
        stay = LOGS | (RESULTS if incumbent else set())
        for path in folder.iterdir():
            if path.name not in stay or path.is_symlink() or path.is_dir():
                _wipe(path)
            elif path.name in LOGS and path.stat().st_size > LOG_BYTES:
                path.write_bytes(path.read_bytes()[-LOG_BYTES:])

    def close(self) -> None:
        """Lets the proposer's thread go; what it was paid for is in the journal."""
        self.halt.set()
        self._drafter.shutdown(wait=True, cancel_futures=True)


def _wipe(path: Path) -> None:
    """Removes a file or a folder that a run, gone now, has made, whatever rights to it the run has left."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    path.chmod(0o700)
    for here, below, _ in os.walk(path):
        for folder in (Path(here, name) for name in below):
            if not folder.is_symlink():
                folder.chmod(0o700)
    shutil.rmtree(path)


def _message(title: str, body: str, facts: dict[str, Any]) -> str:
    """A commit's message: title, hypothesis, facts as trailers."""
    subject = " ".join(title.split())[:120] or "untitled"
    trailers = "\n".join(f"{k}: {v}" for k, v in facts.items())
    return "\n\n".join(part for part in (subject, body.strip(), trailers) if part) + "\n"


def folder_of(root: Path, tag: str) -> Path:
    """Where a night lives."""
    return root / ".nightshift" / tag


def make_home(root: Path) -> Path:
    """.nightshift/, which git leaves alone: ignored, and a repository of its own, so that `git clean -fdx` skips it."""
    home = root / ".nightshift"
    inner = home / ".git"
    try:
        for part in ("objects", "refs"):
            (inner / part).mkdir(parents=True, exist_ok=True)
        (inner / "HEAD").write_text("ref: refs/heads/none\n")
        (inner / "config").write_text("[core]\n\trepositoryformatversion = 0\n\tbare = false\n")
        (home / ".gitignore").write_text("*\n")
    except OSError as error:
        raise Stop(f"{home}: {error.strerror}; a night's journal lies there. Then: python loop.py run") from None
    return home


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One loop at a time on a night: an flock, which goes with the process that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 32).decode().strip()
            raise Stop(
                f"night {folder.name} is being run by process {pid}; `python loop.py status` shows it. "
                "Wait for it, or start another with --tag"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        yield
    finally:
        os.close(fd)
