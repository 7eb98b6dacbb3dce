"""`status` over nights that really were recorded: running, stopped, killed, over, and none at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nights
import pytest
import repositories
from terminals import Terminal

from nightshift import night
from nightshift.journal import Journal
from nightshift.status import status

HERE = Path(__file__).parent
HOLD = """
import sys
from pathlib import Path
from nightshift import night
with night.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of a night that is over, with a keep and its claim."""
    return _played(tmp_path_factory, [nights.GOOD, nights.CRASH], max_experiments=2, claim_per_arm=4)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of a night whose loop is gone after five runs."""
    ideas = [nights.GOOD, nights.Idea("[b]bold[/b] \x1b]0;title\x07", 9, "x9 = 99"), nights.BAD]
    return _played(tmp_path_factory, ideas, runs=5, max_experiments=40, max_hours=10.0, max_usd=5.0)


def _played(tmp_path_factory: pytest.TempPathFactory, ideas: list[nights.Idea], **changes: object) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        repositories.isolated(tmp_path_factory, patch)
        root = repositories.make(tmp_path_factory.mktemp("night") / "repo")
        (root / "program.md").write_text("Improve train.py.\n")
        nights.play(root, ideas, **changes)  # type: ignore[arg-type]
    return root


@pytest.fixture
def root(killed: Path, tmp_path: Path) -> Path:
    """The killed night's files, to change at will."""
    return Path(shutil.copytree(killed, tmp_path / "repo"))


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """The night's lock in another process, as a running loop has it; its pid."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=environment, **pipes)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process.pid
    finally:
        process.communicate()


def lines(root: Path) -> dict[str, str]:
    """The lines of the status with a label, by it; what has no label goes with the label above."""
    told: dict[str, str] = {}
    label = ""
    for line in status(root).splitlines():
        label = line[:11].strip() or label
        told[label] = f"{told.get(label, '')} {line[11:]}".strip()
    return told


def start_of_run(root: Path, number: int) -> None:
    journal = Journal(root / ".nightshift/nov20/journal.jsonl")
    started = next(event for event in reversed(journal.events) if event["event"] == "start")
    fields = {k: v for k, v in started.items() if k not in ("n", "at", "event", "prev")}
    journal.append("start", **fields | {"number": number, "title": "a longer warmup"})
    journal.close()


def test_no_night_at_all_is_one_line_with_the_command_that_begins_one(tmp_path: Path) -> None:
    assert status(tmp_path) == "no night yet; this begins one: python loop.py run"


def test_a_night_that_is_being_prepared(tmp_path: Path) -> None:
    with held(tmp_path / ".nightshift/nov21") as pid:
        assert status(tmp_path) == f"night      nov21 is being prepared by process {pid}"


def test_a_night_that_is_over_shows_its_claim(finished: Path) -> None:
    told = lines(finished)
    assert told["night"] == "over" and told["next"] == "python loop.py report"
    assert told["claim"].startswith("better: -0.02") and told["claim"].endswith("4 runs an arm")
    assert "1 keep" in told["incumbent"] and "bits per byte   run 4" in told["incumbent"]
    assert told["used"] == "2 of 2 experiments   $0.00"
    rows = [line.split()[:3] for line in status(finished).splitlines() if "train.py" in line or "better x3" in line]
    assert rows[0] == ["4", "candidate", "keep"] and rows[-1] == ["13", "claim", "keep"] and len(rows) == 10


def test_a_clone_without_the_live_night_shows_the_published_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "experiments", tmp_path / "experiments")
    assert status(tmp_path) == status(finished)


def test_a_clone_of_an_unfinished_night_does_not_offer_to_go_on_with_it(root: Path) -> None:
    shutil.move(root / ".nightshift/nov20", root / "experiments/nov20")
    told = lines(root)
    assert told["night"] == "unfinished, and its journal is not here but published"
    assert told["next"] == "python loop.py report"


def test_a_killed_night_says_how_it_goes_on(root: Path) -> None:
    told = lines(root)
    assert told["night"].startswith("stopped: its process was killed")
    assert told["next"] == "python loop.py run --tag nov20"
    assert told["used"] == "2 of 40 experiments   $0.00 of $5.00", "no clock runs"
    assert "[b]bold[/b] ]0;title" in status(root) and "\x1b" not in status(root)


def test_a_torn_last_line_is_left_out_and_left_alone(root: Path) -> None:
    whole = status(root)
    journal = root / ".nightshift/nov20/journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"n": 99, "event": "sta')
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert status(root) == whole
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before, "status writes nothing"


def test_a_stopped_night_names_the_cause(root: Path) -> None:
    journal = Journal(root / ".nightshift/nov20/journal.jsonl")
    journal.append("stop", code=1, cause="the disk is full\nMake room", moves_to="")
    journal.close()
    assert lines(root)["night"] == "stopped: the disk is full Make room"
    assert lines(root)["next"] == "python loop.py run --tag nov20"


def test_a_running_night_shows_the_run_in_flight(root: Path) -> None:
    start_of_run(root, 6)
    pulse = {"phase": "training", "step": 70, "loss": 3.25, "tokens": 70_000, "tokens_per_s": 35_000.0}
    told = {"number": 6, "pid": 1, "title": "", **pulse, "elapsed_s": 2.0, "at": time.time()}
    live = root / ".nightshift/nov20/live.json"
    with held(root / ".nightshift/nov20") as pid:
        assert "no news of it yet" in lines(root)["run 6"]
        live.write_text(json.dumps(told))
        shown = lines(root)
        assert shown["night"] == f"running, process {pid}"
        assert shown["run 6"].startswith("candidate   a longer warmup training   step 70   loss 3.2500   35k tokens/s")
        assert shown["run 6"].endswith(" of 8 s")
        assert "of 10 h" in shown["used"] and shown["used"].endswith("left")
        assert f"kill -INT {pid}" in shown["next"]
        live.write_text(json.dumps(told | {"number": 5}))
        assert "no news of it yet" in lines(root)["run 6"], "what an earlier run left behind is not this one's"
        live.write_text('{"number": 6')
        assert "no news of it yet" in lines(root)["run 6"]
    assert "run 6" not in lines(root) and lines(root)["night"].startswith("stopped")


def test_between_two_runs_it_says_what_is_awaited(root: Path) -> None:
    with held(root / ".nightshift/nov20"):
        assert lines(root)["between"] == "the next proposal is being drawn up"


def test_asking_leaves_the_lock_free(root: Path) -> None:
    folder = root / ".nightshift/nov20"
    with held(folder):
        pass
    status(root)
    with night.lock(folder):
        assert lines(root)["night"] == f"running, process {os.getpid()}"


def test_a_terminal_gets_colours_and_a_pipe_gets_none(root: Path) -> None:
    code = f"from pathlib import Path; from nightshift import status; status.show(Path({str(root)!r}))"
    with Terminal(code, columns=60) as terminal:
        terminal.finish()
    assert "\x1b[" in terminal.written and all(len(line) <= 60 for line in terminal.screen.text.splitlines())
    assert "python loop.py run --tag nov20" in terminal.screen.text
    with Terminal(code, NO_COLOR="1") as terminal:
        terminal.finish()
    assert "\x1b" not in terminal.written and "python loop.py run --tag nov20" in terminal.written


def test_it_answers_within_a_second_and_loads_nothing_heavy(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nightshift.status import status; print(status(Path(sys.argv[1])));"
        "print(sorted({'torch', 'numpy', 'pyarrow', 'anthropic', 'huggingface_hub', 'git'} & sys.modules.keys()))"
    )
    took = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, str(root)], cwd=HERE.parent, capture_output=True, text=True)
        took.append(time.monotonic() - started)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert min(took) < 1.0
