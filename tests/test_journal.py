"""The journal against kills, full disks, interrupts and people: what it promises is what a whole night stands on."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nightshift import journal
from nightshift.journal import FIRST, Journal, parse
from nightshift.values import Stop

ROOT = Path(__file__).resolve().parent.parent
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=20),  # any character: line ends, NUL, lone surrogates
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def written(path: Path, count: int = 4) -> bytes:
    """A journal of `count` events, and its bytes."""
    book = Journal(path)
    for i in range(count):
        book.append("start", number=i, title=f"größer\n{i}\t\u2028")
    book.close()
    return path.read_bytes()


def reopened(path: Path) -> list[journal.Event]:
    book = Journal(path)
    book.close()
    return book.events


def chained(text: bytes) -> bool:
    """The promise, spelt out once more: each line carries its number and the SHA-256 of the line before."""
    previous = FIRST
    for number, line in enumerate(text.splitlines(), 1):  # bytes.splitlines cuts at \n and \r alone; JSON escapes \r
        event = json.loads(line)
        if event["prev"] != previous or event["n"] != number:
            return False
        previous = hashlib.sha256(line).hexdigest()
    return text == b"" or text.endswith(b"\n")


def test_a_line_is_an_event_and_follows_from_the_line_before(tmp_path: Path) -> None:
    before = time.time()
    text = written(tmp_path / "new" / "folder" / "journal.jsonl", 3)
    assert chained(text) and text.count(b"\n") == 3
    events = [json.loads(line) for line in text.splitlines()]
    assert [e["n"] for e in events] == [1, 2, 3]
    assert all(before - 0.001 <= e["at"] <= time.time() + 0.001 for e in events)  # rounded to a millisecond
    assert parse(text) == (events, len(text))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies=st.lists(st.dictionaries(st.sampled_from(["title", "reason", "scores", "usd"]), JSON), max_size=4))
def test_what_append_returns_is_what_a_reader_gets(tmp_path: Path, bodies: list[dict[str, object]]) -> None:
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    book = Journal(path)
    told = [book.append("propose", **body) for body in bodies]
    book.close()
    assert told == book.events == reopened(path)
    assert chained(path.read_bytes())


def test_a_character_that_utf8_cannot_hold_is_replaced_before_anybody_sees_it(tmp_path: Path) -> None:
    book = Journal(tmp_path / "journal.jsonl")
    assert book.append("propose", title="half an emoji: \ud83d")["title"] == "half an emoji: ?"
    assert reopened(book.path) == book.events


def test_a_tuple_comes_back_as_the_list_that_the_disk_holds(tmp_path: Path) -> None:
    book = Journal(tmp_path / "journal.jsonl")
    assert book.append("settle", detail={"splits": ("val", "test")})["detail"] == {"splits": ["val", "test"]}


def test_torn_at_every_byte(tmp_path: Path) -> None:
    text = written(tmp_path / "whole.jsonl")
    path = tmp_path / "torn.jsonl"
    for cut in range(len(text) + 1):
        path.write_bytes(text[:cut])
        kept = text[:cut].count(b"\n")
        book = Journal(path)
        assert book.events == parse(text)[0][:kept], f"cut at byte {cut}"
        book.append("leg", cut=cut)
        book.close()
        now = path.read_bytes()
        assert chained(now) and now.count(b"\n") == kept + 1, f"cut at byte {cut}"
        assert now.startswith(b"".join(text.splitlines(keepends=True)[:kept]))


def test_a_reader_of_a_line_in_the_making_sees_the_lines_before(tmp_path: Path) -> None:
    text = written(tmp_path / "journal.jsonl")
    events, length = parse(text + b'{"n": 5, "at"')
    assert (len(events), length) == (4, len(text))


def tampered(lines: list[bytes]) -> Iterator[tuple[list[bytes], int]]:
    """Ways of changing a journal by hand, each with the line at which it shows."""
    for i, line in enumerate(lines[:-1]):
        event = json.loads(line)
        edited = json.dumps(event | {"number": 77}, ensure_ascii=False).encode() + b"\n"
        yield [*lines[:i], edited, *lines[i + 1 :]], i + 2
        yield [*lines[:i], *lines[i + 1 :]], i + 1
        yield [*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]], i + 1
        yield [*lines[: i + 1], *lines[i:]], i + 2
        for broken in (b"\n", b"{}\n", b"[]\n", b"not JSON\n", b"\xff\xfe\n", line[: len(line) // 2] + b"\n"):
            yield [*lines[:i], broken, *lines[i + 1 :]], i + 1


def test_a_journal_changed_by_hand_is_a_stop_that_names_the_line_and_leaves_the_file(tmp_path: Path) -> None:
    lines = written(tmp_path / "whole.jsonl").splitlines(keepends=True)
    path = tmp_path / "changed.jsonl"
    cases = list(tampered(lines))
    assert len(cases) == 30
    descriptors = len(os.listdir("/proc/self/fd"))
    for changed, line in cases:
        path.write_bytes(b"".join(changed))
        with pytest.raises(Stop, match=rf"line {line} does not follow.*changed by hand") as stopped:
            Journal(path)
        assert str(path) in str(stopped.value) and "--tag" in str(stopped.value)
        assert path.read_bytes() == b"".join(changed)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_any_flipped_byte_before_the_last_line_is_noticed(tmp_path: Path) -> None:
    text = written(tmp_path / "journal.jsonl", 3)
    last = text.rindex(b"\n", 0, -1) + 1
    for at in range(last):
        changed = text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]
        with pytest.raises(Stop, match="does not follow"):
            parse(changed)


def test_every_event_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        fsync(fd)
        synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fsync", watched)
    book = Journal(tmp_path / "journal.jsonl")
    for number in range(3):
        book.append("start", number=number)
        assert synced[-1] == book.path.stat().st_size > 0
    assert len(synced) == 3


def test_two_threads_write_one_chain(tmp_path: Path) -> None:
    book = Journal(tmp_path / "journal.jsonl")
    numbers: dict[str, list[int]] = {"night": [], "proposer": []}

    def write(who: str) -> None:
        numbers[who] += [book.append("settle", who=who, i=i)["n"] for i in range(200)]

    threads = [threading.Thread(target=write, args=(who,)) for who in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = reopened(book.path)
    assert [e["n"] for e in events] == list(range(1, 401))
    for who, mine in numbers.items():
        assert [(e["n"], e["i"]) for e in events if e["who"] == who] == list(zip(mine, range(200), strict=True))


def test_an_interrupt_at_any_moment_leaves_a_journal_that_goes_on(tmp_path: Path) -> None:
    """Ctrl-C raises wherever the main thread is; the loop then journals that it stops."""
    book = Journal(tmp_path / "journal.jsonl")

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    told, interrupted = [], 0
    try:
        for i in itertools.count():
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + i % 60))
                while True:
                    told.append(book.append("start", i=i))
            except KeyboardInterrupt:
                interrupted += 1
            if interrupted == 300:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    last = book.append("stop")
    events = reopened(book.path)
    on_disk = {e["n"]: e for e in events}
    assert all(on_disk[e["n"]] == e for e in [*told, last])
    assert 0 <= len(events) - len(told) - 1 <= interrupted


def script(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "writer.py"
    path.write_text("import os, resource, sys\nfrom pathlib import Path\nfrom nightshift.journal import Journal\n"
                    "from nightshift.values import Stop\n" + textwrap.dedent(body))
    return [sys.executable, str(path), str(tmp_path / "journal.jsonl")]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_writer_killed_at_any_moment_has_lost_nothing_that_it_was_told_is_written(tmp_path: Path) -> None:
    command = script(tmp_path, """
        book = Journal(Path(sys.argv[1]))
        while True:
            print(book.append("start", padding="x" * 500)["n"], flush=True)
        """)
    before = 0
    for delay in (0.0, 0.01, 0.03):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert writer.stdout is not None
        first = int(writer.stdout.readline())
        assert first == before + 1
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
        acknowledged = first + rest.count("\n")
        before = len(parse((tmp_path / "journal.jsonl").read_bytes())[0])
        assert before in (acknowledged, acknowledged + 1)


def test_a_file_that_may_not_grow_is_a_stop_and_leaves_the_journal_whole(tmp_path: Path) -> None:
    command = script(tmp_path, """
        book = Journal(Path(sys.argv[1]))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        written = 0
        try:
            while True:
                book.append("start", padding="x" * 300)
                written += 1
        except Stop as stop:
            print(written, stop)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        book.append("stop")
        """)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    count, message = done.stdout.split(" ", 1)
    assert int(count) > 5 and "the ledger is whole" in message and "python loop.py run" in message
    events = reopened(tmp_path / "journal.jsonl")
    assert [e["event"] for e in events] == ["start"] * int(count) + ["stop"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_a_stop_and_leaves_the_journal_whole(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(32 << 10))
    book = Journal(small_disk / "journal.jsonl")
    try:
        for padding in (9000, 700, 1):  # the first of them to fail is half written by then
            with pytest.raises(Stop, match="the disk is full; the ledger is whole up to here. Make room, then") as full:
                for _ in range(100):
                    book.append("start", padding="x" * padding)
            assert full.value.code == 1 and str(book.path) in str(full.value)
            assert parse(book.path.read_bytes()) == (book.events, book.path.stat().st_size)
        (small_disk / "ballast").unlink()
        book.append("stop")
        assert reopened(book.path)[-1]["event"] == "stop"
    finally:
        book.close()


def test_no_room_for_a_journal_at_all_is_a_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Stop, match=r"file.*Not a directory|file.*File exists"):
        Journal(tmp_path / "file" / "nov20" / "journal.jsonl")


def test_a_figure_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    book = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError):
        book.append("decide", score=math.nan)
    with pytest.raises(AssertionError):
        book.append("decide", n=7)
    book.append("decide", score=1.0)
    assert chained(book.path.read_bytes()) and len(reopened(book.path)) == 1
