"""The morning report: `python loop.py report` writes report.html, one file that needs nothing else, and progress.png.

Titles, hypotheses, diffs and logs were written by a proposer or a candidate, so all of them are untrusted: whatever
reaches the page goes through `escaped`, and the page forbids scripts and everything from outside.
"""

from __future__ import annotations

import base64
import html
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nightshift import ledger, plots
from nightshift.branch import Branch
from nightshift.journal import Event, parse
from nightshift.ledger import RAN, Row, State
from nightshift.plots import UNITS, census, counted, mark_of
from nightshift.scorer import tail
from nightshift.style import CSS
from nightshift.values import Stop

LOG_LINES = 100
# Control characters, and the marks that make text read in another order than it runs.
COLOURS = re.compile("\x1b\\[[0-9;]*m")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Night:
    """A night as the report reads it."""

    root: Path
    events: list[Event]
    state: State

    @property
    def tag(self) -> str:
        return str(self.state.night["tag"])

    @property
    def unit(self) -> str:
        return UNITS[self.state.rules["objective"]]

    def figure(self, value: float, sign: bool = False) -> str:
        """A score, or a difference of two, with the digits that its unit deserves."""
        digits = 2 if self.state.rules["objective"] == "time_to_target" else 4
        return f"{value:{'+' * sign}.{digits}f}".replace("-", "−")


def report(root: Path, tag: str | None = None) -> int:
    """Writes the report of night `tag`, or of the newest; 1 where there is none. Stop where it cannot be written."""
    states = ledger.nights(root)
    chosen = [state for state in states if tag in (None, state.night["tag"])]
    if not chosen:
        known = ", ".join(str(state.night["tag"]) for state in states)
        print(f"no night {tag}; there are: {known}" if known else "no night yet: `python loop.py run` begins one")
        return 1
    path = ledger.journals(root)[chosen[-1].night["tag"]]
    events = parse(path.read_bytes(), str(path))[0]
    night = Night(root, events, ledger.fold(events))
    sentence = verdict(night)
    beliefs = plots.steps(events)
    light = plots.progress(night.state, beliefs, sentence)
    dark = plots.progress(night.state, beliefs, sentence, dark=True)
    _write(root / "progress.png", light)
    _write(root / "report.html", _page(night, sentence, light, dark).encode())
    print(f"night {night.tag}: {sentence}\nwritten: report.html, progress.png")
    return 0


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise Stop(f"{path}: {error.strerror}. Once that is mended: python loop.py report") from None


# What may be said


def verdict(night: Night) -> str:
    """What the night may claim, in a sentence. Only the claim's own runs speak; no belief, no best draw."""
    claim = night.state.claim
    if claim is None:
        return "The night is not over, and claims nothing yet."
    kept = counted(len(night.state.keeps), "keep")
    if "test" not in claim:
        if night.state.keeps:
            return f"Too short to claim: {kept} on the branch, measured too seldom to be called a finding."
        return f"No keep, no claim: {counted(len(night.state.of('candidate')), 'candidate')}, and none that was kept."
    told = {
        "better": "The night's final train.py is better than its first",
        "worse": "The night's final train.py is worse than its first",
    }.get(claim["verdict"], "No difference is shown between the night's final train.py and its first")
    if claim["verdict"] not in ("better", "worse") and claim["test"]["high"] < 0:
        target = night.state.rules["target_loss"]
        told = f"Quicker, but not shown to reach a loss of {target:g}, so no gain is claimed"
    test = claim["test"]
    low, high = night.figure(test["low"], True), night.figure(test["high"], True)
    return (
        f"{told}: {night.figure(test['delta'], True)} {night.unit} on the sealed test split "
        f"(95% interval {low} to {high}; {claim['per_arm']} fresh runs an arm)."
    )


def tone(state: State) -> str:
    """How the verdict is coloured: good, bad or open."""
    return {"better": "good", "worse": "bad"}.get(state.claim["verdict"] if state.claim else "", "open")


def escaped(text: object) -> str:
    """Text as HTML shows it literally, in an element or an attribute; what cannot be seen is shown as a box."""
    return html.escape(UNPRINTABLE.sub("\u25af", COLOURS.sub("", str(text))))


# The page


def _page(night: Night, sentence: str, light: bytes, dark: bytes) -> str:
    rows = [_run(night, row) for row in night.state.rows]
    running = night.state.running
    if running:
        now = f"run {running.number} ({running.kind}): {ledger.description(running)}"
        rows.append(f'<p class="note">Running, or cut off: {escaped(now)}</p>')
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>nightshift: night {escaped(night.tag)}</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>night {escaped(night.tag)}</h1><p>{escaped(_setting(night))}</p></header>
<p class="verdict {tone(night.state)}">{escaped(sentence)}</p>
{_claim(night)}
{_picture(light, dark, sentence)}
<p class="note">The line is what the night believes of its incumbent, and steers by. It moves with lucky draws too,
so no gain can be read off it; what may be claimed stands above.</p>
{_summary(night)}
<h2>Experiments</h2>
{_filters(night.state)}
<div class="runs">
<div class="head cells"><span>#</span><span>what became of it</span><span>experiment</span><span>score</span>
<span title="of one draw, against the belief about the incumbent: it steers, and is no measured gain">Δ</span>
<span title="probability that it is better, as judged from this draw">P(better)</span><span>seconds</span></div>
{"".join(rows)}
</div>
<footer>{_footer(night)}</footer>
</body>
</html>
"""


def _setting(night: Night) -> str:
    header = night.state.night
    rules = night.state.rules
    began = time.strftime("%d %B %Y, %H:%M", time.localtime(header["at"]))
    steps = rules["budget_steps"]
    budget = f"{steps} steps" if steps else f"{rules['budget_s']:g} s"
    return f"begun {began} · {header['device']} · profile {header['profile']}, {budget} a run · torch {header['torch']}"


def _claim(night: Night) -> str:
    """Every estimate of the claim, losses too, with a picture of the intervals."""
    claim = night.state.claim
    if not claim or "test" not in claim:
        return ""
    lines = ["<table><tr><th>split</th><th>first</th><th>final</th><th>difference</th><th>95% interval</th></tr>"]
    for split, note in (("test", "sealed until the claim"), ("val", "the split that steered")):
        told = {name: night.figure(claim[split][name], name not in ("first", "final")) for name in claim[split]}
        cells = [f"{split}, {note}", told["first"], told["final"], told["delta"], f"{told['low']} to {told['high']}"]
        lines.append("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in cells) + "</tr>")
    lines.append("</table>")
    caption = f"Means of {claim['per_arm']} runs an arm, in {night.unit}, lower is better; pooled t."
    return f'<div class="claim">{_forest(claim)}<div>{"".join(lines)}<p class="note">{caption}</p></div></div>'


def _forest(claim: Event) -> str:
    """The two intervals and zero, to scale."""
    ends = [0.0, *(claim[split][name] for split in ("test", "val") for name in ("low", "high"))]
    low, room = min(ends), (max(ends) - min(ends)) or 1.0
    x = {value: 20 + 260 * (value - low) / room for value in (*ends, claim["test"]["delta"], claim["val"]["delta"])}
    bars = [f'<line class="zero" x1="{x[0.0]:.1f}" x2="{x[0.0]:.1f}" y1="4" y2="66"/>']
    bars.append(f'<text x="{x[0.0]:.1f}" y="80" text-anchor="middle">no difference</text>')
    for split, y in (("test", 20), ("val", 48)):
        left, right, middle = (x[claim[split][name]] for name in ("low", "high", "delta"))
        bars.append(f'<line class="{split}" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>')
        bars.append(f'<circle class="{split}" cx="{middle:.1f}" cy="{y}" r="5"/>')
        bars.append(f'<text x="{(left + right) / 2:.1f}" y="{y - 9}" text-anchor="middle">{split}</text>')
    return f'<svg viewBox="-30 0 360 84" role="img" aria-label="intervals">{"".join(bars)}</svg>'


def _picture(light: bytes, dark: bytes, sentence: str) -> str:
    source, fallback = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (dark, light))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{source}">'
        f'<img src="{fallback}" alt="the night, run by run: {escaped(sentence)}"></picture>'
    )


def _summary(night: Night) -> str:
    state = night.state
    worked = seconds_at_work(night.events)
    trained = sum(row.train_s for row in state.rows)
    marks = [mark_of(row) for row in state.rows if row.status in RAN]
    tiles = {
        "runs": str(len(state.rows)),
        "candidates": str(len(state.of("candidate"))),
        "kept": str(marks.count("kept")),
        "taken back": str(marks.count("taken back")),
        "failed": str(len(state.rows) - len(marks)),
        "at work": duration(worked),
        "of it training": f"{100 * trained / worked:.0f}%" if worked else "–",
        "proposals cost": f"${state.usd:.2f}",
    }
    told = "".join(f"<div><dt>{name}</dt><dd>{escaped(value)}</dd></div>" for name, value in tiles.items())
    return f'<dl class="tiles">{told}</dl>'


def seconds_at_work(events: Iterable[Event]) -> float:
    """Over all legs of a night, each from its beginning to its end or, where it was cut off, to its last event."""
    total, began, last = 0.0, None, 0.0
    for event in events:
        if event["event"] == "leg":
            total += last - began if began is not None else 0.0
            began = event["at"]
        last = event["at"]
    return total + (last - began if began is not None else 0.0)


def duration(seconds: float) -> str:
    """'9 h 36 min', '1 min 52 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


# One experiment

GROUPS = ("kept", "discarded", "failed", "checks")


def group_of(row: Row) -> str:
    """The one of GROUPS under which a run is found."""
    if row.status not in RAN:
        return "failed"
    return "checks" if row.kind != "candidate" else "kept" if mark_of(row) in ("kept", "taken back") else "discarded"


def _filters(state: State) -> str:
    groups = [group_of(row) for row in state.rows]
    options = [("all", len(groups)), *((name, groups.count(name)) for name in GROUPS)]
    return '<div class="filters">' + "".join(
        f'<input type="radio" name="show" id="show-{name}"{" checked" * (name == "all")}>'
        f'<label for="show-{name}">{name} <b>{count}</b></label>'
        for name, count in options
    ) + "</div>"


def _run(night: Night, row: Row) -> str:
    """A run's line and, folded away, all that is known of it."""
    outcome = mark_of(row) if row.status in RAN else str(row.status)
    cells = [
        str(row.number),
        outcome,
        ledger.description(row),
        "" if row.score is None else night.figure(row.score),
        "" if row.delta is None else night.figure(row.delta, True),
        "" if row.p_better is None else f"{row.p_better:.2f}",
        f"{row.total_s:.0f}",
    ]
    line = "".join(f"<span>{escaped(cell)}</span>" for cell in cells)
    group = group_of(row)
    return f'<details class="{group}"><summary class="cells">{line}</summary>{_folded(night, row)}</details>\n'


def _folded(night: Night, row: Row) -> str:
    folder = night.root / "experiments" / night.tag / f"{row.number:03d}"
    live = night.root / ".nightshift" / night.tag / "runs" / f"{row.number:03d}"
    parts = [_figures(row)]
    if row.hypothesis.strip():
        parts.append(f'<h3>Hypothesis</h3><p class="prose">{escaped(row.hypothesis.strip())}</p>')
    if row.kind == "candidate":
        parts.append(f"<h3>Change</h3>{_diff(night, row, folder / 'change.diff')}")
    if row.status not in RAN or not row.counts:
        log = tail(folder / "run.log", LOG_LINES) or tail(live / "run.log", LOG_LINES)
        parts.append(f"<h3>What happened</h3><pre>{escaped(row.reason)}</pre>")
        if log and log.strip() not in row.reason:
            parts.append(f"<h3>The end of its log</h3><pre>{escaped(log)}</pre>")
    return f'<div class="folded">{"".join(parts)}</div>'


def _figures(row: Row) -> str:
    told: dict[str, object] = {"kind": row.kind, "status": row.status, "seed": row.seed, "commit": row.commit[:10]}
    told |= {"train.py of run": row.parent or "the start"}
    if row.kind == "candidate":
        told |= {"proposer": row.proposer, "family": row.family, "cost": f"${row.usd:.4f}"}
    for name, split in row.scores.items():
        told |= {f"{name} bits per byte": f"{split.bpb:.6f}", f"{name} nats per token": f"{split.loss:.6f}"}
    if row.status in RAN:
        told |= {
            "steps": f"{row.steps:,}",
            "tokens": f"{row.tokens / 1e6:.1f} M",
            "parameters": f"{row.num_params / 1e6:.1f} M",
            "training": f"{row.train_s:.1f} s",
            "start-up": f"{row.startup_s:.1f} s",
            "memory": f"{row.memory_mb / 1024:.1f} GB",
        }
    told |= {"attempt": row.attempt} if row.attempt > 1 else {}
    items = (f"<div><dt>{escaped(k)}</dt><dd>{escaped(v)}</dd></div>" for k, v in told.items() if v != "")
    return f'<dl class="figures">{"".join(items)}</dl>'


def _diff(night: Night, row: Row, published: Path) -> str:
    """The change, coloured: as published or, before that, from git."""
    try:
        text = published.read_bytes().decode(errors="replace")
    except OSError:
        try:
            text = Branch(night.root, night.tag).diff(row.parent_blob, row.blob)
        except Stop:
            return '<p class="note">Neither published nor in this clone.</p>'
    if not text:
        return '<p class="note">No change was made.</p>'
    lines = text.removesuffix("\n").split("\n")[2 if text.startswith("--- ") else 0 :]
    return f'<pre class="diff">{"".join(_diff_line(line) for line in lines)}</pre>'


def _diff_line(line: str) -> str:
    kind = {"+": "add", "-": "del", "@": "hunk"}.get(line[:1], "same")
    return f'<span class="{kind}">{escaped(line) or " "}</span>'


def _footer(night: Night) -> str:
    tag, base = night.tag, night.state.night["base"][:10]
    told = [
        f"The keeps, one commit each: <code>git log --oneline {escaped(base)}..autoresearch/{escaped(tag)}</code>",
        f"All of them at once: <code>git diff {escaped(base)} autoresearch/{escaped(tag)} -- train.py</code>",
        f"{escaped(', '.join(census(night.state)))}; figures from the journal. <code>python loop.py verify</code> "
        "checks that they can be believed.",
    ]
    return "".join(f"<p>{part}</p>" for part in told)
