"""The parts that the live view and `status` are put together from.

Titles and reasons come from proposers and from candidates: they are shown literally, never as markup, and without
the characters that a terminal would obey.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nightshift import decide
from nightshift.ledger import Row, State, clean, description

LAST = 10  # results that are shown
LABEL = 11  # columns of the margin
FAILED = {"crash": "red", "timeout": "yellow", "invalid": "magenta"}
PHASES = {"starting": "starting, off the clock", "saving": "saving and scoring"}
# Columns of the results, and how wide a terminal must be to show them.
COLUMNS = {"run": 0, "kind": 64, "status": 0, "score": 0, "delta": 56, "p": 72, "description": 46}


@dataclass(frozen=True)
class Pulse:
    """What a run was last known to be doing. `at` is seconds since the epoch, the rest is on the runner's clock."""

    phase: str
    step: int
    loss: float | None
    tokens: int
    tokens_per_s: float
    elapsed_s: float  # in this phase
    at: float


def line(*parts: str | tuple[str, str]) -> Text:
    """One line of text, some of it styled, that is cut off and not wrapped where the terminal is narrow."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def labelled(label: str, *parts: str | tuple[str, str]) -> Text:
    """A line with its label in the margin."""
    return line((f"{label:<{LABEL}}", "dim"), *parts)


def span(seconds: float) -> str:
    """A duration as one says it: 12 s, 7 min, 2 h 05 min."""
    if seconds < 60:
        return f"{max(0.0, seconds):.0f} s"
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def quantity(n: float) -> str:
    """A count in at most four digits: 812, 41k, 1.21M."""
    return f"{n:.0f}" if n < 1e3 else f"{n / 1e3:.0f}k" if n < 1e6 else f"{n / 1e6:.2f}M"


def figure(state: State, score: float, sign: str = "") -> str:
    """A score or a difference of scores, to the digits that mean something in this night's unit."""
    return f"{score:{sign}.4f}" if state.rules["objective"] == "val_bpb" else f"{score:{sign}.2f}"


def heading(state: State) -> Text:
    """Which night this is."""
    night = state.night
    conditions = f"   {night['profile']} · {night['device']}"
    return line(("nightshift ", "bold"), (night["tag"], "bold cyan"), (conditions, "dim"))


def incumbent(state: State) -> Text:
    """What leads, and what is believed of it: mean ± standard deviation, never a gain."""
    top = state.incumbent
    who = f"run {top.number}" if top.number else "the first train.py"
    if top.belief is None:
        return labelled("incumbent", who, ("   not measured yet", "dim"))
    unit = "bits per byte" if state.rules["objective"] == "val_bpb" else "s to the target"
    spread = math.sqrt(top.belief.s2)
    keeps = len(state.keeps)
    return labelled(
        "incumbent",
        (f"{figure(state, top.belief.m)} ± {figure(state, spread)}", "bold"),
        f" {unit}   {who}",
        (f"   {top.commit[:7]}   {keeps} keep{'' if keeps == 1 else 's'}", ""),
        (f"   σ {figure(state, math.sqrt(decide.variance(state)))}", "dim"),
    )


def running(state: State, pulse: Pulse | None, now: float, waiting_s: float | None = None) -> Group:
    """The run in flight, or what is awaited, in three lines. `now` is seconds since the epoch."""
    row = state.running
    if row is None:
        task = decide.next(state, now)
        awaited = {"candidate": "the next proposal is being drawn up", "end": "the search is over"}
        told = awaited.get(task.kind, f"a {task.kind} run is next")
        waited = "" if waiting_s is None else span(waiting_s)
        return Group(labelled("between", told), labelled("", (waited, "dim")), Text())
    attempt = f", attempt {row.attempt}" if row.attempt > 1 else ""
    title = labelled(f"run {row.number}", (f"{row.kind}{attempt}", "cyan"), f"   {clean(row.title)}")
    if pulse is None:
        return Group(title, labelled("", ("no news of it yet", "dim")), Text())
    doing = [PHASES.get(pulse.phase, pulse.phase)]
    if pulse.loss is not None:
        doing += [f"step {pulse.step:,}", f"loss {pulse.loss:.4f}", f"{quantity(pulse.tokens_per_s)} tokens/s"]
    return Group(title, labelled("", "   ".join(doing)), _clock(state, pulse, now))


def _clock(state: State, pulse: Pulse, now: float) -> Table:
    """The budget as a bar. It runs on between two pulses."""
    elapsed = pulse.elapsed_s + max(0.0, now - pulse.at)
    rules = state.rules
    if rules["budget_steps"] is not None:
        done, total, unit = float(pulse.step), float(rules["budget_steps"]), "steps"
    else:
        done, total, unit = elapsed, rules["budget_s"], "s"
    if pulse.phase == "starting":
        done, told = 0.0, f"{elapsed:.0f} s"
    elif pulse.phase == "training":
        done = min(done, total)
        told = f"{done:.0f} of {total:g} {unit}"
    else:
        done, told = total, f"{elapsed:.0f} s"
    grid = Table.grid(expand=True)
    grid.add_column(width=LABEL)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    bar = ProgressBar(total, done, style="bright_black", complete_style="cyan", finished_style="green")
    grid.add_row("", bar, Text(f"  {told}", style="dim"))
    return grid


def limits(state: State, now: float | None) -> Text:
    """Experiments, dollars and time against what the leg may use. `now` is None where nothing runs."""
    most = state.leg.get("limits", {})
    tried, at_most = len(state.of("candidate")), most.get("max_experiments")
    parts = [f"{tried} of {at_most} experiments" if at_most is not None else f"{tried} experiments"]
    usd = most.get("max_usd")
    parts.append(f"${state.usd:.2f} of ${usd:.2f}" if usd is not None else f"${state.usd:.2f}")
    if now is not None and state.leg:
        parts.append(_time(state, now))
    return labelled("used", "   ".join(parts))


def _time(state: State, now: float) -> str:
    """How long the leg has run and how long it will: by its limit, else by what a run has taken so far."""
    passed, most = now - state.leg["at"], state.leg["limits"]
    if most["max_hours"] is not None:
        left = 3600 * most["max_hours"] - passed
        return f"{span(passed)} of {most['max_hours']:g} h, {span(left)} left"
    if most["max_experiments"] is None or not state.rows or state.over:
        return f"{span(passed)} so far"
    runs = max(0, most["max_experiments"] - len(state.of("candidate")))
    runs += max(0, state.rules["baselines"] - len(state.scored("baseline")))
    runs += 2 * state.night["claim_n"] - len(state.scored("claim")) if state.keeps else 0
    typical = fmean(row.total_s for row in state.rows)
    begun = min(typical, now - state.running.at) if state.running else 0.0
    return f"{span(passed)} so far, about {span(runs * typical - begun)} left"


def results(state: State, width: int, rows: int = LAST) -> Table:
    """The last runs, newest below, in as many columns as `width` has room for."""
    shown = [name for name, least in COLUMNS.items() if width >= least]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand="description" in shown, header_style="dim")
    titles = {"score": "val_bpb" if state.rules["objective"] == "val_bpb" else "seconds"}
    for name in shown:
        right = name in ("run", "score", "delta", "p")
        ratio = 1 if name == "description" else None
        table.add_column(titles.get(name, name), justify="right" if right else "left", no_wrap=True, ratio=ratio)
    standing = {keep.number for keep in state.keeps}
    for row in state.rows[-rows:] if rows else []:
        cells = _cells(state, row)
        style = "dim" if row.status == "discard" else "bold" if row.number in standing else ""
        table.add_row(*(cells[name] for name in shown), style=style)
    return table


def _cells(state: State, row: Row) -> dict[str, Text]:
    status = row.status or ""
    colour = "green" if row.kind == "candidate" and status == "keep" else FAILED.get(status, "")
    cells = {
        "run": str(row.number),
        "kind": row.kind,
        "score": "" if row.score is None else figure(state, row.score),
        "delta": "" if row.delta is None else figure(state, row.delta, "+"),
        "p": "" if row.p_better is None else f"{row.p_better:.2f}",
        "description": clean(description(row)),
    }
    return {name: line(text) for name, text in cells.items()} | {"status": line((status, colour))}
