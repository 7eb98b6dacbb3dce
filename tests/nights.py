"""Whole nights in seconds: the real journal, branch, decisions and records; only the training is a throw of dice."""

from __future__ import annotations

import math
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightshift import config, decide, opening, publish
from nightshift.branch import Branch
from nightshift.config import Config
from nightshift.data import Dataset
from nightshift.devices import Lease
from nightshift.journal import Journal
from nightshift.night import Ledger, Night, folder_of, make_home
from nightshift.runner import Bench
from nightshift.sandbox import Tier
from nightshift.values import Brief, Candidate, Proposal, Reject, Run, Score, SplitScore, Task
from nightshift.view import View

BYTES, TOKENS = 1_000_000, 300_000  # of a held-out split
SIGMA = 0.003
SHIFTS = {"val": 0.0, "test": 20_000.0}  # nats by which a split is harder


@dataclass(frozen=True)
class Idea:
    """Replaces `x<line> = <line>` by `text`; every copy of `text` in a train.py moves its true score by `effect`."""

    title: str
    line: int
    text: str
    effect: float = 0.0
    hypothesis: str = "It may help."
    fails: str = ""  # crash, timeout, invalid, or refused: the proposer's edits do not match
    unhealthy: str = ""  # what is wrong with the device whenever it runs


GOOD = Idea("a better x3", 3, "x3 = 33", -0.02, hypothesis="Because of <script>alert(1)</script> & more.")
BAD = Idea("a worse x5", 5, "x5 = 55", +0.1)
CRASH = Idea("a crash", 7, "raise SystemExit", fails="crash")
REFUSED = Idea("no such lines", 0, "", fails="refused")


class Script:
    """A proposer with a list of ideas."""

    name, ahead = "script", False

    def __init__(self, ideas: list[Idea]) -> None:
        self.ideas = ideas

    def propose(self, brief: Brief) -> Proposal | None:
        """The idea that is next in the list, on the incumbent of now."""
        if brief.asked >= len(self.ideas):
            return None
        idea = self.ideas[brief.asked]
        if idea.fails == "refused":
            raise Reject("invalid", idea.title)
        text = brief.train_py.replace(f"x{idea.line} = {idea.line}\n", f"{idea.text}\n")
        return Proposal(idea.title, idea.hypothesis, text, self.name, "test", -0.01, 1000, 0.01)


def rules(**changes: Any) -> Config:
    """The demo profile, at a noise of SIGMA, without an end of its own."""
    return config.load(profile="demo", **{"sigma0": SIGMA, "max_experiments": 1000, "proposer": "script"} | changes)


def play(root: Path, ideas: list[Idea], tag: str = "nov20", seed: int = 0, runs: int = 1000, **changes: Any) -> Night:
    """Runs a night in the repository `root` until it ends, or is cut off, unpublished, before its run `runs` + 1."""
    settings = rules(**changes)
    make_home(root)
    dataset = Dataset(root, {}, settings.vocab_size, 0, settings.seq_len, (), (), "digest", "")
    bench = Bench(settings, dataset, Lease((), "dice (2 cores)"), Tier(False, 0), root)
    book = Ledger(Journal(folder_of(root, tag) / "journal.jsonl"))
    branch = Branch(root, tag)
    opening.take_up(root, tag, book, branch, bench)
    night = Night(root, book, branch, bench, None, Script(ideas), threading.Event(), View())  # type: ignore[arg-type]
    night.advance()
    while (task := decide.next(night.state, time.time())).kind != "end" and len(night.state.rows) < runs:
        drafted = night.propose(task)
        if drafted is None:
            continue
        run = score = None
        try:
            dice = random.Random(f"{seed} {task.number}")  # the same however often a run is tried
            run, score = _train(night.commit(task, drafted), ideas, dice, settings)
            decision = decide.judge(night.state, task, run, score, run.candidate.net_added)
        except Reject as reason:
            decision = decide.reject(night.state, reason)
        night.record(decision, run, score)
        night.advance()
    if task.kind == "end":
        _finish(night, task)
    night.close()
    return night


def _train(candidate: Candidate, ideas: list[Idea], dice: random.Random, settings: Config) -> tuple[Run, Score]:
    """One throw. In a time_to_target night a run takes 100 s times its length, and an effect is one on its loss."""
    lines = (candidate.folder / "train.py").read_text().splitlines()
    (candidate.folder / "run.log").write_text("step 1 <b>loss</b> 5.5\nstep 2 \x1b[31mloss\x1b[0m 5.1\n")
    made = [idea for idea in ideas if idea.text in lines]
    failure = next((idea.fails for idea in made if idea.fails), "")
    if failure:
        raise Reject(failure, "train.py ended before run.finish()\nTraceback:\n  <img src=x onerror=alert(2)>")
    effect = sum(idea.effect for idea in made) + dice.gauss(0.0, SIGMA)
    nats, train_s = (3.0 + effect) * math.log(2) * BYTES, 8.0 + dice.random() / 10
    if settings.objective == "time_to_target":
        train_s = 100.0 * candidate.task.length + dice.random() / 10
        nats = (settings.target_loss + effect - 0.3 * math.log(candidate.task.length)) * TOKENS
    splits = {name: SplitScore(nats + shift, BYTES, TOKENS) for name, shift in SHIFTS.items()}
    ill = next((idea.unhealthy for idea in made if idea.unhealthy), "")
    run = Run(candidate, Path(), 100, 51_200, 2.0, train_s, 512.0 + dice.random(), 1_000_000, 6e6, ill)
    return run, Score({name: splits[name] for name in candidate.task.splits}, train_s)


def _finish(night: Night, task: Task) -> None:
    """What the loop does at the end of a night."""
    if not night.state.over:
        night.book.write("claim", **decide.claim(night.state, task.why))
    records = publish.write_records(night.root, night.folder, night.state, night.branch)
    night.write_results()
    paths = [records, night.root / "results.tsv"]
    moves_to = night.branch.publish(paths, f"ledger of night {night.state.night['tag']}\n", time.time())
    night.book.write("stop", code=0, cause=task.why, moves_to=moves_to)
