"""How a night begins, and how it is taken up again: its name, what it is run under, and what earlier nights know."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nightshift import decide, ledger
from nightshift.branch import Branch
from nightshift.config import Config
from nightshift.journal import parse
from nightshift.ledger import State
from nightshift.night import Ledger, folder_of
from nightshift.runner import Bench
from nightshift.values import Stop

SAME = ("device", "data_digest", "torch", "profile")  # what scores must share to be compared
OURS = ("cache", "bytecode", "by-hand")  # folders in .nightshift/ that runs may write or read
TAG = re.compile(r"\w[\w.-]*")
OVERHEAD_S = 15.0  # a guess at what a run costs beyond its budget, for planning the claim before anything has run


def choose_tag(root: Path, wanted: str | None) -> str:
    """The night to work on: the one asked for, else the newest unfinished one, else a new one named for today."""
    states = {s.night["tag"]: s for s in ledger.nights(root)}
    here = {tag for tag in states if (folder_of(root, tag) / "journal.jsonl").exists()}
    if wanted is None:
        unfinished = [tag for tag in states if tag in here and not states[tag].closed]
        return unfinished[-1] if unfinished else _new_tag(set(states))
    git_refuses = not TAG.fullmatch(wanted) or ".." in wanted or wanted.endswith((".", ".lock")) or len(wanted) > 60
    if git_refuses or wanted in OURS:
        raise Stop(f"--tag {wanted!r}: a tag is made of letters, digits, '-', '_' and '.', as in --tag nov20", 2)
    if wanted in states and (wanted not in here or states[wanted].closed):
        why = "is over" if states[wanted].closed else "was begun in another checkout, where alone it can go on"
        raise Stop(f"night {wanted} {why}: `python loop.py report` shows it; --tag NAME begins another", 2)
    return wanted


def _new_tag(taken: set[str]) -> str:
    today = datetime.date.today().strftime("%b%d").lower()
    names = [today, *(today + chr(c) for c in range(ord("b"), ord("z") + 1))]
    free = [name for name in names if name not in taken]
    if not free:
        raise Stop(f"the names {today} to {today}z are all taken; --tag NAME begins a night of any other name", 2)
    return free[0]


def as_before(root: Path, tag: str) -> dict[str, Any]:
    """Profile, proposer and limits of the night's last leg; nothing for a night that is yet to begin."""
    path = folder_of(root, tag) / "journal.jsonl"
    state = ledger.fold(parse(path.read_bytes(), str(path))[0]) if path.exists() else State()
    if not state.leg:
        return {}
    return {"profile": state.rules["profile"], "proposer": state.leg["proposer"], **state.leg["limits"]}


def take_up(root: Path, tag: str, book: Ledger, branch: Branch, bench: Bench) -> None:
    """Begins the night, or checks that it can go on; either way journals a leg of it."""
    if not book.state.night:
        base = branch.start()
        book.write("night", **_header(root, tag, base, branch.blob(base), bench))
    else:
        _same_conditions(book.state, bench)
        ours = book.state.tip_before, book.state.tip
        found = branch.resume(*ours)
        if found not in ours:  # published, and then killed before the journal said so
            book.write("stop", code=1, cause="it was ended while it published", moves_to=found)
    config = bench.config
    limits = {name: getattr(config, name) for name in ("max_experiments", "max_hours", "max_usd")}
    book.write("leg", pid=os.getpid(), sandbox=str(bench.tier), limits=limits, proposer=config.proposer)


def _header(root: Path, tag: str, base: str, blob: str, bench: Bench) -> dict[str, Any]:
    config = bench.config
    conditions = _conditions(bench)
    earlier = [s for s in ledger.nights(root) if _conditions_of(s) == conditions]
    return {
        "tag": tag,
        "base": base,
        "blob": blob,
        "config": asdict(config),
        "seed": int.from_bytes(hashlib.sha256(f"{tag}:{base}:{time.time_ns()}".encode()).digest()[:4]) >> 1,
        "rules": decide.RULES,
        "claim_n": _claim_n(config),
        "sigma0": _sigma0(config, earlier),
        "prior": _repeats(earlier, blob),
        **conditions,
    }


def _claim_n(config: Config) -> int:
    run_s = config.budget_s + OVERHEAD_S
    return decide.claim_runs(config.max_experiments, config.max_hours, run_s, config.claim_per_arm)


def _conditions(bench: Bench) -> dict[str, str]:
    return {
        "device": bench.lease.name,
        "data_digest": bench.dataset.digest,
        "torch": importlib.metadata.version("torch"),
        "profile": bench.config.profile,
    }


def _conditions_of(state: State) -> dict[str, str]:
    return {name: state.night.get(name, "") for name in SAME}


def _same_conditions(state: State, bench: Bench) -> None:
    """A night goes on only under what it began under: its scores would not compare otherwise."""
    now, then = _conditions(bench), _conditions_of(state)
    changed = [f"{name} was {then[name]}, is {now[name]}" for name in SAME if now[name] != then[name]]
    shaping = ("objective", "budget_s", "budget_steps", "seq_len", "vocab_size", "gpus", "target_loss")
    for name in shaping:
        if state.rules.get(name) != getattr(bench.config, name):
            changed.append(f"{name} was {state.rules.get(name)}, is {getattr(bench.config, name)}")
    if changed:
        tag = state.night["tag"]
        raise Stop(
            f"night {tag} cannot go on: {'; '.join(changed)}. Its scores would not compare. "
            f"Bring that back (in config.yaml, or by --profile {then['profile']}), "
            "or begin another night: python loop.py run --tag NAME"
        )


def _repeats(earlier: list[State], blob: str) -> dict[str, float]:
    """Sum of squares and degrees of freedom of earlier nights' baselines of this blob, each about its mean."""
    found = [decide.scatter(state, "baseline") for state in earlier if state.night["blob"] == blob]
    return {"ss": sum(ss for ss, _ in found), "df": sum(df for _, df in found)}


def _sigma0(config: Config, earlier: list[State]) -> float:
    """The profile's σ₀, moved towards what earlier nights on the same device saw: it counts as PRIOR_DF draws."""
    found = [decide.scatter(state, "baseline", "sentinel") for state in earlier]
    ss, df = sum(ss for ss, _ in found), sum(df for _, df in found)
    return float(((decide.PRIOR_DF * config.sigma0**2 + ss) / (decide.PRIOR_DF + df)) ** 0.5)
