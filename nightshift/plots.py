"""progress.png: a night in one picture. matplotlib is imported when it is drawn, not before."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nightshift import decide, ledger
from nightshift.journal import Event
from nightshift.ledger import RAN, Row, State
from nightshift.values import Belief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = 14  # keeps that are named in the picture, those that moved the belief most; the report names all
LABEL_CHARS = 44
DPI = 150
UNITS = {"val_bpb": "bits per byte", "time_to_target": "seconds at equal loss"}


@dataclass(frozen=True)
class Theme:
    """The colours that depend on the background."""

    paper: str
    ink: str
    quiet: str  # secondary text
    grid: str
    discard: str


LIGHT = Theme("#ffffff", "#1c1f24", "#666d78", "#e6e8eb", "#a9b0ba")
DARK = Theme("#15181d", "#e8eaed", "#98a1ad", "#2a2f37", "#5f6875")


@dataclass(frozen=True)
class Mark:
    """How a kind of run is drawn: by shape, and in a colour that the colour-blind tell apart (Okabe and Ito's set)."""

    shape: str
    colour: str
    size: float
    filled: bool = True
    above: int = 3  # what is drawn over what


MARKS = {
    "discarded": Mark("o", "", 18.0),
    "did not count": Mark("x", "", 18.0),
    "baseline": Mark("s", "#0072B2", 34.0, above=4),
    "kept": Mark("o", "#009E73", 52.0, above=5),
    "taken back": Mark("o", "#009E73", 46.0, filled=False, above=5),
    "sentinel": Mark("D", "#E69F00", 32.0, above=4),
    "claim run, first": Mark("v", "#CC79A7", 30.0, filled=False, above=4),
    "claim run, final": Mark("^", "#CC79A7", 30.0, above=4),
}
FAILURE = "#D55E00"
BELIEF, KNOWN, NOISE = "belief about the incumbent", "± s: how well it is known", "± σ: noise of one run"


def mark_of(row: Row) -> str:
    """The name under which a scored run stands in the legend."""
    if not row.counts:
        return "did not count"
    if row.taken_back_by:
        return "taken back"
    if row.kind == "claim":
        return f"claim run, {row.arm}"
    return row.kind if row.kind != "candidate" else "kept" if row.status == "keep" else "discarded"


@dataclass(frozen=True)
class Step:
    """What was believed of the incumbent once this run was decided."""

    number: int
    belief: Belief
    sigma: float  # of one run


def steps(events: list[Event]) -> list[Step]:
    """The beliefs of a night, a step a run, from the first baseline on."""
    state, found = State(), []
    for event in events:
        state.apply(event)
        if event["event"] == "decide" and (belief := state.incumbent.belief):
            found.append(Step(event["number"], belief, math.sqrt(decide.variance(state))))
    return found


def progress(state: State, path: list[Step], verdict: str, dark: bool = False) -> bytes:
    """The night as a PNG: runs, the staircase of the belief with its noise, the keeps by name. Safe for any title."""
    import matplotlib
    from matplotlib.figure import Figure

    theme = DARK if dark else LIGHT
    settings: Any = {"text.parse_math": False, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of characters in titles that the font lacks
        figure = Figure(figsize=(12, 6.4), dpi=DPI, facecolor=theme.paper)
        axes = figure.add_axes((0.07, 0.17, 0.905, 0.65))
        _frame(axes, state, path, theme)
        _staircase(axes, path, theme)
        drawn = _runs(axes, state.rows, theme)
        _title(figure, state, verdict, theme)
        _legend(figure, axes, theme)
        _name_keeps(figure, axes, state, path, drawn, theme)
        png = io.BytesIO()
        figure.savefig(png, format="png", facecolor=theme.paper)
    return png.getvalue()


def limits(scores: list[float], path: list[Step]) -> tuple[float, float]:
    """The y-axis: all of the belief and its noise, and of the scores as much as leaves that readable.

    One run that went badly wrong is drawn at the edge, rather than squash the night into a line.
    """
    if not path:
        return (min(scores), max(scores)) if scores else (0.0, 1.0)
    low = min(step.belief.m - 2 * step.sigma for step in path)
    high = max(step.belief.m + 2 * step.sigma for step in path)
    room = high - low
    return max(min([*scores, low]), low - room / 2), min(max([*scores, high]), high + room / 2)


def _frame(axes: Axes, state: State, path: list[Step], theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = limits([r.score for r in state.rows if r.status in RAN and r.score is not None], path)
    room = (high - low) or 1.0
    axes.set_ylim(low - 0.14 * room, high + 0.05 * room)  # failures stand below
    axes.set_xlim(0.3, max(len(state.rows), 2) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_facecolor(theme.paper)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.quiet, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)
    unit = UNITS[state.rules["objective"]].replace("bits", "validation bits")
    axes.set_xlabel("experiment", color=theme.quiet, fontsize=10)
    axes.set_ylabel(f"{unit}, lower is better", color=theme.quiet, fontsize=10)
    claims = [r.number for r in state.rows if r.kind == "claim"]
    if claims:
        axes.axvspan(claims[0] - 0.5, len(state.rows) + 0.5, color=theme.grid, alpha=0.45, linewidth=0, zorder=0)


def _staircase(axes: Axes, path: list[Step], theme: Theme) -> None:
    """m as a step a run, in a band of s (how well it is known) and one of σ (how far one run lies from it)."""
    if not path:
        return
    x = [float(step.number) for step in path] + [path[-1].number + 0.5]
    last = [*path, path[-1]]
    m = [step.belief.m for step in last]
    bands = (([math.sqrt(step.belief.s2) for step in last], 0.30, KNOWN),
             ([step.sigma for step in last], 0.13, NOISE))
    for spread, alpha, label in bands:
        low, high = [a - b for a, b in zip(m, spread, strict=True)], [a + b for a, b in zip(m, spread, strict=True)]
        axes.fill_between(x, low, high, step="post", color="#56B4E9", alpha=alpha, linewidth=0, label=label, zorder=1)
    axes.step(x, m, where="post", color=theme.ink, linewidth=1.6, label=BELIEF, zorder=2)


def _runs(axes: Axes, rows: list[Row], theme: Theme) -> list[tuple[float, float]]:
    """Draws every run; returns where the scored ones stand."""
    bottom, top = axes.get_ylim()
    scored = [row for row in rows if row.status in RAN and row.score is not None]
    inside = {r.number: r.score for r in scored if r.score is not None and bottom < r.score < top}
    for name, mark in MARKS.items():
        group = [row.number for row in scored if mark_of(row) == name and row.number in inside]
        if group:
            colour = mark.colour or theme.discard
            y = [inside[number] for number in group]
            style: dict[str, Any] = {"c": colour, "linewidths": 1.2}
            if mark.shape != "x":
                edge = theme.paper if mark.filled else colour
                style = {"c": colour if mark.filled else theme.paper, "edgecolors": edge,
                         "linewidths": 0.7 if mark.filled else 1.4}
            axes.scatter(group, y, s=mark.size, marker=mark.shape, zorder=mark.above, label=name, **style)
    beyond = [(r.number, r.score) for r in scored if r.score is not None and r.number not in inside]
    if beyond:
        x, y = [n for n, _ in beyond], [0.985 if score >= top else 0.015 for _, score in beyond]
        axes.scatter(x, y, s=26, marker="^", c=theme.quiet, transform=axes.get_xaxis_transform(), label="off the scale")
    failed = [row.number for row in rows if row.status not in RAN]
    if failed:
        style = {"marker": "|", "s": 90, "linewidths": 1.8, "c": FAILURE, "transform": axes.get_xaxis_transform()}
        axes.scatter(failed, [0.03] * len(failed), label="failed", **style)
    return [*inside.items()]


def _title(figure: Figure, state: State, verdict: str, theme: Theme) -> None:
    night = state.night
    figure.text(0.07, 0.945, f"night {night['tag']}", color=theme.ink, fontsize=17, fontweight="bold")
    facts = [*census(state), str(night["device"]), f"profile {night['config']['profile']}"]
    figure.text(0.975, 0.95, "  ·  ".join(facts), color=theme.quiet, fontsize=10, ha="right")
    figure.text(0.07, 0.91, textwrap.fill(verdict, 145), color=theme.ink, fontsize=10.5, va="top", linespacing=1.5)


def census(state: State) -> list[str]:
    """How many runs, keeps and failures, in words."""
    failed = sum(row.status not in RAN for row in state.rows)
    back = sum(bool(row.taken_back_by) for row in state.rows)
    kept = counted(len(state.keeps) + back, "keep") + (f" ({back} taken back)" if back else "")
    return [counted(len(state.rows), "run"), kept, counted(failed, "failure")]


def counted(number: int, noun: str) -> str:
    """'1 keep', '2 keeps'."""
    return f"{number} {noun}" + "s" * (number != 1)


def _legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [name for name in (BELIEF, KNOWN, NOISE, *MARKS, *found) if name in found]
    names = list(dict.fromkeys(order))
    handles = [found[name] for name in names]
    columns = math.ceil(len(names) / 2) if len(names) > 7 else max(1, len(names))
    legend = figure.legend(handles, names, loc="lower center", ncol=columns, frameon=False, fontsize=9,
                           bbox_to_anchor=(0.52, 0.0), handletextpad=0.5, columnspacing=1.8)
    for text in legend.get_texts():
        text.set_color(theme.quiet)


# Naming the keeps

Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


def _name_keeps(
    figure: Figure, axes: Axes, state: State, path: list[Step], drawn: list[tuple[float, float]], theme: Theme
) -> None:
    """Writes the titles of the keeps that moved the belief most, each where nothing else stands, below it if it can."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke

    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    dots = {x: tuple(to_pixels((x, y))) for x, y in drawn}
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in dots.values()]
    for a, b in zip(path, path[1:], strict=False):
        left, y = to_pixels((a.number, a.belief.m))
        taken.append((left, y - 2, to_pixels((b.number, 0))[0], y + 2))
    frame = tuple(axes.get_window_extent().extents)
    keeps = [row for row in state.rows if mark_of(row) in ("kept", "taken back") and row.number in dots]
    keeps = sorted(sorted(keeps, key=lambda r: r.delta or 0.0)[:LABELS], key=lambda r: r.number)
    for row in keeps:
        title = textwrap.shorten(ledger.description(row), LABEL_CHARS, placeholder="…")
        text = axes.text(0, 0, f"#{row.number} {title}", fontsize=8, color=theme.ink, zorder=6, va="center")
        text.set_path_effects([withStroke(linewidth=2.5, foreground=theme.paper, alpha=0.8)])
        extent = text.get_window_extent()
        place = _free_place(dots[row.number], extent.width, extent.height, taken, frame)
        if place is None:
            text.remove()
            continue
        box, leader = place
        taken += [box, leader]
        from_pixels = axes.transData.inverted().transform
        text.set_position(tuple(from_pixels((box[0], (box[1] + box[3]) / 2))))
        ends = from_pixels([(dots[row.number][0], leader[1]), (dots[row.number][0], leader[3])])
        axes.plot(ends[:, 0], ends[:, 1], color=theme.quiet, linewidth=0.6, zorder=2)


def _free_place(dot: Any, width: float, height: float, taken: list[Box], frame: Any) -> tuple[Box, Box] | None:
    """Where a label of this size covers nothing, and the line that leads to it, straight down or up from the dot."""
    x, y = dot
    for down in (True, False):
        for distance in range(22, 420 if down else 260, 5):
            centre = y - distance if down else y + distance
            near, far = (y - 8, centre + height / 2) if down else (centre - height / 2, y + 8)
            leader = (x - 1.5, min(near, far), x + 1.5, max(near, far))
            for left in (x - 4, x - width + 4, x - width / 2):
                box = (left, centre - height / 2 - 2, left + width, centre + height / 2 + 2)
                within = frame[0] <= box[0] and box[2] <= frame[2] and frame[1] + 24 <= box[1] and box[3] <= frame[3]
                if within and not any(_overlap(box, other) or _overlap(leader, other) for other in taken):
                    return box, leader
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
