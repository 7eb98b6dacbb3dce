"""The view, on real terminals and pipes, over the journal of a night that really was recorded."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import nights
import pytest
import repositories
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, Group
from terminals import Terminal

from nightshift import panels
from nightshift.journal import Event, parse
from nightshift.ledger import State, clean, fold
from nightshift.panels import Pulse
from nightshift.runner import Live
from nightshift.values import Candidate, Task
from nightshift.view import View

HOSTILE = nights.Idea("[red]softcap[/red] \x1b[31;5m30\x07 \u202e\u2028tail", 9, "x9 = 99", +0.1)
IDEAS = [nights.GOOD, HOSTILE, nights.CRASH, nights.BAD, nights.REFUSED]
PATH = os.pathsep.join(str(path) for path in (Path(__file__).parent, Path(__file__).parent.parent))
FOLLOW = """
import sys
from test_view import follow
follow({journal!r}, {pause})
"""


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a night with a keep, a discard with a hostile title, a crash and a refused proposal."""
    with pytest.MonkeyPatch.context() as patch:
        repositories.isolated(tmp_path_factory, patch)
        root = repositories.make(tmp_path_factory.mktemp("night") / "repo")
        (root / "program.md").write_text("Improve train.py.\n")
        night = nights.play(root, IDEAS, max_experiments=len(IDEAS), max_usd=5.0)
    return night.folder / "journal.jsonl"


def events_of(journal: Path) -> list[Event]:
    return parse(journal.read_bytes())[0]


def follow(journal: str, pause: float) -> None:
    """Shows the night again, `pause` seconds a run, as the loop would; Ctrl-C ends it. Runs in a process of its own."""
    state = State()
    with View() as view:
        view.say("profile demo: [bold]as asked[/bold]")
        try:
            for event in events_of(Path(journal)):
                state.apply(event | {"at": time.time()})
                if event["event"] == "start":
                    folder = Path(journal).parent / "runs" / f"{event['number']:03d}"
                    view.starts(Candidate(Task(event["kind"], event["number"]), event["title"], "", "", folder), state)
                    view.watch(Live("training", 7, 3.25, 7000, 2.0))
                    time.sleep(pause)
                elif event["event"] == "decide":
                    view.ended(state)
                    view.say(f"news after run {event['number']}")
        except KeyboardInterrupt:
            view.say("interrupted")
        view.close()
        view.say("the night is over")
    view.say("next: python loop.py report")


def code(journal: Path, pause: float = 0.02) -> str:
    return FOLLOW.format(journal=str(journal), pause=pause)


# On a terminal


def test_a_terminal_is_left_with_the_results_and_the_last_words_below_them(journal: Path) -> None:
    with Terminal(code(journal)) as terminal:
        assert terminal.finish() == 0
        screen = terminal.screen
    assert screen.cursor_shown and screen.clears == 0
    lines = screen.text.splitlines()
    assert lines[0] == "profile demo: [bold]as asked[/bold]"
    assert [line for line in lines if line.startswith("news")] == [f"news after run {n}" for n in range(1, 9)]
    assert lines[-2:] == ["the night is over", "next: python loop.py report"]
    assert sum("nightshift nov20" in line for line in lines) == 1, "a torn picture was left behind"
    assert lines.index("news after run 8") < next(i for i, x in enumerate(lines) if "nightshift nov20" in x)
    (head,) = (i for i, line in enumerate(lines) if line.split()[:3] == ["run", "kind", "status"])
    assert [line.split()[:3] for line in lines[head + 1 : head + 9]] == [
        *(["1", "baseline", "keep"], ["2", "baseline", "keep"], ["3", "baseline", "keep"]),
        *(["4", "candidate", "keep"], ["5", "candidate", "discard"], ["6", "candidate", "crash"]),
        *(["7", "candidate", "discard"], ["8", "candidate", "invalid"]),
    ]
    assert "[red]softcap[/red] [31;5m30 tail" in lines[head + 5]


def test_the_running_experiment_is_shown_with_its_clock(journal: Path) -> None:
    with Terminal(code(journal, pause=60)) as terminal:
        terminal.until("tokens/s")
        terminal.until(" of 8 s")
        shown = terminal.screen.text
        terminal.type("\x03")
        assert terminal.finish() == 0
    assert "run 1      baseline   baseline: the unchanged train.py" in shown
    assert "training   step 7   loss 3.2500   4k tokens/s" in shown
    assert "the first train.py   not measured yet" in shown
    assert "0 of 5 experiments   $0.00 of $5.00" in shown
    lines = terminal.screen.text.splitlines()
    assert lines[-2:] == ["the night is over", "next: python loop.py report"] and terminal.screen.cursor_shown
    assert sum("nightshift nov20" in line for line in lines) == 1 and not any("step 7" in line for line in lines)


def test_a_narrowed_terminal_is_cleared_once_and_drawn_anew(journal: Path) -> None:
    with Terminal(code(journal, pause=60), columns=100, rows=24) as terminal:
        terminal.until("tokens/s")
        terminal.resize(44, 16)
        terminal.until("run 1")
        terminal.until("run 1")
        terminal.type("\x03")
        terminal.finish()
        screen = terminal.screen
    assert screen.clears == 1
    assert sum("nightshift nov20" in line for line in screen.lines) == 1
    assert all(len(line.rstrip()) <= 44 for line in screen.lines)


def test_more_results_than_the_terminal_has_lines_for(journal: Path) -> None:
    with Terminal(code(journal), columns=80, rows=16) as terminal:
        terminal.finish()
    rows = [line.split()[0] for line in terminal.screen.text.splitlines() if line[:5].strip().isdigit()]
    assert rows == ["4", "5", "6", "7", "8"], "the newest are what one wants to see"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_plain_lines_where_the_terminal_is_not_to_be_drawn_on(journal: Path, environment: dict[str, str]) -> None:
    with Terminal(code(journal), **environment) as terminal:
        terminal.finish()
    assert "\x1b" not in terminal.written and "run 4: keep, val_bpb 2." in terminal.written


# Without one


def test_a_pipe_gets_a_line_when_a_run_starts_and_one_when_it_ends(journal: Path) -> None:
    environment = os.environ | {"PYTHONPATH": PATH, "FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code(journal)], env=environment, capture_output=True, check=True)
    lines = done.stdout.decode("ascii").splitlines()
    assert b"\x1b" not in done.stdout and not done.stderr
    assert lines[1] == "run 1 (baseline): baseline: the unchanged train.py"
    ends = [line for line in lines if line.startswith("run ") and "(" not in line.split(":")[0]]
    assert [line.split()[1:3] for line in ends][3:] == [
        *(["4:", "keep,"], ["5:", "discard,"], ["6:", "crash,"], ["7:", "discard,"], ["8:", "invalid,"]),
    ]
    row = fold(events_of(journal)).rows[3]
    assert row.score is not None and row.delta is not None and row.p_better is not None
    figures = f"val_bpb {row.score:.4f}, delta {row.delta:+.4f}, p {row.p_better:.2f}, {row.total_s:.1f} s"
    assert ends[3] == f"run 4: keep, {figures}: a better x3"
    assert ends[5].endswith("s: a crash (train.py ended before run.finish())")
    assert len(lines) == 1 + 3 * 8 + 2, "one when it starts, one when it ends, one of news; nothing else"


def test_plain_lines_are_there_at_once(journal: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": PATH}
    process = subprocess.Popen([sys.executable, "-c", code(journal, pause=60)], env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        told = b""
        while b"run 1 (baseline)" not in told:
            assert select.select([process.stdout], [], [], 10.0)[0], "the line is held back"
            told += os.read(process.stdout.fileno(), 1 << 16)
    finally:
        process.kill()
        process.communicate()


def test_a_closed_pipe_does_not_end_the_night(journal: Path) -> None:
    script = code(journal) + "\nprint('it went on', file=sys.stderr, flush=True)\nimport os; os._exit(0)"
    environment = os.environ | {"PYTHONPATH": PATH}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"it went on\n")


# For other processes


def test_live_json_says_what_runs_and_goes_when_the_run_ends(journal: Path, tmp_path: Path) -> None:
    state, view = fold(events_of(journal)), View()
    folder = tmp_path / "nov20/runs/009"
    folder.mkdir(parents=True)
    told = tmp_path / "nov20/live.json"
    view.starts(Candidate(Task("candidate", 9), "an idea", "", "", folder), state)
    assert json.loads(told.read_text()) | {"at": 0} == {
        **{"pid": os.getpid(), "number": 9, "title": "an idea", "phase": "starting", "step": 0, "loss": None},
        **{"tokens": 0, "tokens_per_s": 0.0, "elapsed_s": 0.0, "at": 0},
    }
    before = told.stat().st_ino
    for step in range(100):
        view.watch(Live("training", step, 3.0, step * 100, step / 10))
    assert told.stat().st_ino == before, "it is written once a second at most"
    view.ended(state)
    assert list((tmp_path / "nov20").iterdir()) == [tmp_path / "nov20/runs"]


def test_a_folder_that_cannot_be_written_to_is_passed_over(journal: Path, tmp_path: Path) -> None:
    view = View()
    view.starts(Candidate(Task("candidate", 9), "an idea", "", "", tmp_path / "gone/runs/009"), State())
    view.watch(Live("training", 1, 3.0, 100, 1.0))
    view.ended(fold(events_of(journal)))


# Whatever a proposer writes


@given(st.text())
def test_clean_leaves_one_line_that_a_terminal_only_shows(text: str) -> None:
    told = clean(text)
    assert clean(told) == told and "\n" not in told and "\r" not in told
    assert not [c for c in told if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    told.encode()


@given(st.text(alphabet=st.characters(exclude_categories=["C", "Z"])))
def test_clean_changes_nothing_that_is_harmless(word: str) -> None:
    assert clean(f"{word} {word}") == f"{word} {word}".strip()


@given(title=st.text(), width=st.integers(20, 130), loss=st.none() | st.floats(0, 1e9), tokens=st.integers(0, 10**12))
def test_no_line_is_wider_than_its_terminal(title: str, width: int, loss: float | None, tokens: int) -> None:
    night = {"event": "night", "tag": "nov20", "base": "0" * 40, "blob": "1" * 40, "profile": "demo", "device": "CPU"}
    config = {"objective": "val_bpb", "budget_s": 8.0, "budget_steps": None, "baselines": 3}
    state = fold([night | {"config": config, "at": 0.0}])
    fields = {"number": 1, "kind": "baseline", "parent": 0, "seed": 0, "attempt": 2, "arm": "", "length": 1.0}
    names = ("blob", "parent_blob", "commit", "hypothesis", "family", "proposer")
    fields |= {"usd": 0, "proposal": 0, **dict.fromkeys(names, "")}
    state.apply({"event": "start", "title": title, "at": 0, **fields})
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as captured:
        pulse = Pulse("training", 10, loss, tokens, tokens / 3, 3.0, 0.0)
        console.print(Group(panels.heading(state), panels.running(state, pulse, 1.0), panels.incumbent(state)))
    lines = captured.get().split("\n")
    assert len(lines) == 6 and all(cell_len(line) <= width for line in lines)
    assert "\x1b" not in captured.get()
