"""A night's choices, made again: what ran next, what became of it, and what is claimed, from the journal alone."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nightshift import decide
from nightshift.journal import Event
from nightshift.ledger import RAN, State
from nightshift.values import Candidate, Decision, Reject, Run, Score, SplitScore, Task

TOLERANCE = 1e-9  # relative, and absolute: the same rule on another processor
DECIDED = ("status", "score", "delta", "p_better", "belief", "age", "takes_back", "repeat_length")
CHOSEN = ("kind", "attempt", "seed", "parent", "arm", "length")
MALFORMED = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)  # of a journal, followed


def faults(events: list[Event], texts: dict[str, bytes]) -> tuple[list[str], int, int]:
    """Where the journal and the rules of `decide` part; how many choices were made again; how many could not be.

    `texts` holds train.py by blob: what a keep must gain depends on how many lines it adds.
    """
    if events and events[0].get("rules", 1) != decide.RULES:
        return [], 0, len(events)
    state, wrong, made, unknown = State(), [], 0, 0
    for event in events:
        name = f"run {event['number']}" if "number" in event else f"the {event['event']}"
        try:
            expected = _expected(state, event, texts)
        except MALFORMED as error:
            wrong.append(f"{name}: what is recorded leads to no decision ({type(error).__name__}: {error})")
            expected = {}
        if expected is None:
            unknown += 1
        elif expected:
            made += 1
            wrong += [
                f"{name}: {key} is {event.get(key)}, the rule gives {value}"
                for key, value in expected.items()
                if not _close(event.get(key), value)
            ]
        state.apply(event)
    return wrong, made, unknown


def _expected(state: State, event: Event, texts: dict[str, bytes]) -> dict[str, Any] | None:
    """The fields of an event that follow from the events before it: {} where none do, None where a text is lacking."""
    if event["event"] == "start":
        return _chosen(state, event)
    if event["event"] == "decide":
        return _decided(state, event, texts)
    return decide.claim(state, event["why"]) if event["event"] == "claim" else {}


def _chosen(state: State, event: Event) -> dict[str, Any]:
    """What was to run next, as of the moment in which it started."""
    task = decide.next(state, event["at"])
    if task.kind in ("claim", "end") and event["kind"] in ("candidate", "sentinel"):
        return {}  # the hours or the ideas ran out while it was being drawn up
    return {key: getattr(task, key) for key in CHOSEN}


def _decided(state: State, event: Event, texts: dict[str, bytes]) -> dict[str, Any] | None:
    """What becomes of a run with the score that is recorded."""
    row = state.running
    if row is None:
        raise ValueError("nothing was running")
    if not event["scores"]:
        if event["status"] in RAN:
            raise ValueError(f"{event['status']} without a score")
        return _fields(decide.reject(state, Reject(event["status"], event["reason"])))
    parent = state.incumbent.blob
    if row.blob != parent and not {row.blob, parent} <= texts.keys():
        return None
    net_added = _lines(texts[row.blob]) - _lines(texts[parent]) if row.blob != parent else 0
    scores = {name: SplitScore(**split) for name, split in event["scores"].items()}
    task = Task(row.kind, row.number, row.attempt, row.seed, row.parent, row.blob, row.arm, tuple(scores), row.length)
    unhealthy = ""
    if event["repeat_length"] == row.length and event["reason"].startswith(decide.REPEATED):
        unhealthy = event["reason"].removeprefix(decide.REPEATED)  # off its target it is repeated at another length
    run = Run(
        candidate=Candidate(task, row.title, row.blob, row.commit, Path(), net_added),
        weights=Path(),
        train_s=event["train_s"],
        peak_memory_mb=event["memory_mb"],
        unhealthy=unhealthy,
        **{name: event[name] for name in ("steps", "tokens", "startup_s", "num_params", "flops_per_token")},
    )
    decision = decide.judge(state, task, run, Score(scores, event["train_s"]), net_added)
    if decision.status == "keep" and event["status"] not in RAN:  # scored, and then refused by the audit
        decision = decide.reject(state, Reject(event["status"], event["reason"]))
    return _fields(decision)


def _fields(decision: Decision) -> dict[str, Any]:
    fields = asdict(decision)
    fields["repeat_length"] = fields.pop("length")
    return {key: fields[key] for key in DECIDED}


def _lines(text: bytes) -> int:
    """Lines as git counts them: the last one may lack its end."""
    return text.count(b"\n") + bool(text and not text.endswith(b"\n"))


def _close(told: Any, value: Any) -> bool:
    """Equal, numbers within TOLERANCE."""
    if isinstance(value, dict):
        return isinstance(told, dict) and all(_close(told.get(key), part) for key, part in value.items())
    if isinstance(value, float) and isinstance(told, (int, float)):
        return math.isclose(told, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(told == value)
