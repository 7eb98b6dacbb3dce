"""The ledger: whatever becomes of the process, state is what the journal says, and nothing in it is lost or doubled."""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from simulated import FIRST, Sheet, World, begin, draft, judged, night, play, record, scored, start, whole

from nightshift import decide
from nightshift.journal import Journal, parse
from nightshift.ledger import State, fold, results_tsv
from nightshift.night import Ledger, Purse
from nightshift.values import Belief, Reject, Stop

SHORT: dict[str, Any] = {"max_experiments": 14, "sentinel_every": 3, "claim_per_arm": 2, "sigma0": 0.003}


def eventful(seed: int) -> World:
    """A world where everything happens: gains and losses, crashes, runs that do not count."""
    def effect(proposal: int) -> float:
        return random.Random(f"{seed}-{proposal}").gauss(-0.001, 0.004)

    def fate(run_seed: int) -> str:
        return random.Random(f"{seed}:{run_seed}").choices(["", "crash", "unhealthy"], [8, 1, 1])[0]

    return World(seed, effect=effect, fate=lambda s: "unhealthy" if fate(s) == "crash" and s % 2 else fate(s))


def told(state: State) -> list[dict[str, Any]]:
    """What a night knows of its runs, without when and how often they were tried."""
    return [{k: v for k, v in row.__dict__.items() if k not in ("attempt", "at")} for row in state.rows]


# The fold


@pytest.mark.parametrize("seed", range(4))
def test_a_night_killed_after_any_event_ends_as_if_it_had_not_been(seed: int) -> None:
    world, sheet = eventful(seed), Sheet()
    begin(sheet, seed, **SHORT)
    state = whole(sheet, world)
    kinds = Counter(row.kind for row in state.rows)
    assert kinds["baseline"] >= 3 and kinds["candidate"] >= 14 and kinds["sentinel"] >= 4
    for cut in range(2, len(sheet.events)):
        again = Sheet(sheet.events[:cut])
        running = again.state.running
        task = decide.next(again.state, 0.0)
        if running is not None:
            assert (task.number, task.seed, task.attempt) == (running.number, running.seed, 2)
        whole(again, world)
        assert told(again.state) == told(state), f"killed after event {cut}"
        assert again.state.stack == state.stack and again.state.claim is not None and state.claim is not None
        assert again.state.claim["verdict"] == state.claim["verdict"]


def test_those_nights_hold_all_that_can_become_of_a_run() -> None:
    """What the test above is worth: if the worlds change and a case goes missing, this says so."""
    seen: Counter[str] = Counter()
    for seed in range(4):
        sheet = Sheet()
        begin(sheet, seed, **SHORT)
        for row in whole(sheet, eventful(seed)).rows:
            seen[f"{row.kind} {row.status}"] += 1
            seen["taken back"] += row.taken_back_by > 0
            seen["repeated"] += not row.counts
    wanted = ["candidate keep", "candidate discard", "candidate crash", "sentinel keep", "claim keep", "repeated"]
    assert all(seen[case] for case in [*wanted, "taken back"]), seen


def test_numbers_run_from_one_without_a_gap_and_seeds_are_fresh() -> None:
    sheet = Sheet()
    begin(sheet, 1, **SHORT)
    rows = whole(sheet, eventful(1)).rows
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    assert len({row.seed for row in rows}) == len(rows)
    assert all(0 <= row.seed < 2**31 for row in rows)


class Loop(RuleBasedStateMachine):
    """The loop, killed and taken up again at any point. The journal is a real file; the state must follow from it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ledger-"))
        self.path = self.folder / "journal.jsonl"
        self.book = Ledger(Journal(self.path))
        self.journal = self.book._journal
        begin(self.book, 3, baselines=2, sentinel_every=3, max_experiments=8, claim_per_arm=2, max_usd=1.0)
        self.purse = Purse(self.book, 1.0)
        self.mine = False  # whether the run in flight was started by this process
        self.spent = {"": 0.0}

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)

    def comes(self, *kinds: str) -> bool:
        return decide.next(self.book.state, 0.0).kind in kinds

    @precondition(lambda self: self.comes("candidate") and len(self.book.state.drafted) < 2)
    @rule(title=st.text(max_size=12), usd=st.floats(0, 0.1))
    def propose(self, title: str, usd: float) -> None:
        before = self.book.state.asked
        draft(self.book, title, usd=usd)
        assert self.book.state.asked == before + 1

    @precondition(lambda self: self.book.state.drafted and self.book.state.running is None)
    @rule()
    def drop(self) -> None:
        self.book.write("drop", id=next(iter(self.book.state.drafted)), why="conflict")

    @precondition(lambda self: not self.mine)
    @rule()
    def start(self) -> None:
        task = decide.next(self.book.state, 0.0)
        if task.kind == "end" or (task.kind == "candidate" and task.attempt == 1 and not task.again
                                  and not self.book.state.drafted):
            return
        before = self.book.state.running
        assert task.number == len(self.book.state.rows) + 1
        start(self.book, task)
        self.mine = True
        after = self.book.state.running
        assert after is not None
        if before is not None:
            assert (after.number, after.seed, after.blob) == (before.number, before.seed, before.blob)
            assert after.attempt == before.attempt + 1

    @precondition(lambda self: self.mine)
    @rule(bpb=st.floats(0.98, 1.02), lines=st.integers(-50, 100), fate=st.sampled_from(["", "", "crash", "unhealthy"]))
    def finish(self, bpb: float, lines: int, fate: str) -> None:
        state, row = self.book.state, self.book.state.running
        assert row is not None
        rows = len(state.rows)
        if fate == "crash":
            record(self.book, decide.reject(state, Reject("crash", "boom\nTraceback")))
        else:
            score = scored(bpb, test=bpb)
            task = decide.next(state, 0.0)
            record(self.book, judged(state, task, score, lines, fate), score)
        self.mine = False
        assert len(state.rows) == rows + 1 and state.rows[-1].number == row.number
        assert state.rows[-1].status is not None

    @rule(usd=st.floats(0.0, 0.6))
    def reserve(self, usd: float) -> None:
        before = self.book.state.usd
        call = self.purse.reserve(usd)
        assert (call is None) == (before + usd > 1.0)
        if call is not None:
            assert call not in self.spent
            self.spent[call] = usd

    @precondition(lambda self: len(self.spent) > 1)
    @rule(share=st.floats(0.0, 1.0), which=st.integers(0))
    def settle(self, share: float, which: int) -> None:
        call = list(self.spent)[1:][which % (len(self.spent) - 1)]
        self.spent[call] *= share
        self.purse.settle(call, self.spent[call], {"input_tokens": 3})

    @precondition(lambda self: self.comes("end") and not self.book.state.over)
    @rule()
    def end(self) -> None:
        self.book.write("claim", **decide.claim(self.book.state, decide.next(self.book.state, 0.0).why))

    @rule(torn=st.binary(max_size=40).filter(lambda tail: b"\n" not in tail))
    def kill(self, torn: bytes) -> None:
        """What was in memory is gone, and a line in the making was cut off."""
        before = self.book.state
        self.journal.close()
        with self.path.open("ab") as file:
            file.write(torn)
        self.book = Ledger(Journal(self.path))
        self.journal = self.book._journal
        self.purse = Purse(self.book, 1.0)
        assert self.book.state == before
        self.mine = False

    @invariant()
    def memory_is_what_the_journal_says(self) -> None:
        assert fold(parse(self.path.read_bytes())[0]) == self.book.state

    @invariant()
    def nothing_is_doubled_or_lost(self) -> None:
        state = self.book.state
        assert [row.number for row in state.rows] == list(range(1, len(state.rows) + 1))
        assert all(row.status for row in state.rows)
        used = [row.proposal for row in state.rows if row.kind == "candidate" and row.counts]
        assert len(used) == len(set(used)) and not set(used) & state.drafted.keys()
        assert results_tsv([state]).count("\n") == len(state.rows) + 1

    @invariant()
    def the_branch_stands_where_the_keeps_are(self) -> None:
        state = self.book.state
        standing = [r.number for r in state.rows if r.kind == "candidate" and r.status == "keep"]
        assert [keep.number for keep in state.keeps] == standing
        assert len({keep.blob for keep in state.stack}) == len(state.stack)

    @invariant()
    def money_is_never_overspent(self) -> None:
        assert self.book.state.usd == pytest.approx(sum(self.spent.values()))
        assert self.book.state.usd <= 1.0


TestLoop = Loop.TestCase
TestLoop.settings = settings(max_examples=40, stateful_step_count=60, deadline=None,
                             suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def test_an_event_of_a_later_version_is_a_stop() -> None:
    sheet = Sheet()
    begin(sheet)
    with pytest.raises(Stop, match="'teleport' that this version of nightshift does not know"):
        sheet.write("teleport")


# Beliefs and the branch


def test_a_keep_lies_on_its_parent_and_comes_off_again() -> None:
    sheet = night(1.0, 1.001, 0.999, sentinel_every=1)
    parent = sheet.state.incumbent
    assert parent.belief is not None
    play(sheet, scored(0.996))
    assert [i.number for i in sheet.state.stack] == [0, 4]
    assert (sheet.state.tip_before, sheet.state.tip) == ("c-first", "keep-4")
    assert sheet.state.incumbent.blob == f"{FIRST}/1" and sheet.state.incumbent.commit == "keep-4"
    play(sheet, scored(1.05))  # the sentinel
    row = sheet.state.rows[3]
    assert (row.status, row.taken_back_by) == ("discard", 5)
    assert (sheet.state.tip_before, sheet.state.tip) == ("keep-4", "revert-4")
    back = sheet.state.incumbent
    assert (back.number, back.blob, back.commit) == (0, FIRST, "c-first")
    assert back.belief is not None
    assert back.belief.m == parent.belief.m and back.belief.s2 > parent.belief.s2


def test_a_sentinel_that_crashes_is_no_check_survived() -> None:
    sheet = night(1.0, 1.001, 0.999, sentinel_every=1)
    play(sheet, scored(0.996))
    for _ in range(decide.CHECKS):
        assert decide.next(sheet.state, 0.0).kind == "sentinel"
        play(sheet, Reject("crash", "out of memory"))
        assert sheet.state.incumbent.sentinels == 0
        play(sheet, scored(1.1))  # a candidate, discarded
    play(sheet, scored(1.05))
    assert not sheet.state.keeps


def test_a_repeated_sentinel_is_one_check() -> None:
    sheet = night(1.0, 1.001, 0.999, sentinel_every=1)
    play(sheet, scored(0.996))
    play(sheet, scored(0.996), unhealthy="a stranger's process")
    assert sheet.state.incumbent.sentinels == 0
    play(sheet, scored(0.996))
    assert sheet.state.incumbent.sentinels == 1


def test_a_proposal_is_used_once() -> None:
    sheet = night(1.0, 1.001, 0.999)
    draft(sheet, "one")
    draft(sheet, "two")
    play(sheet, scored(1.1))
    assert [d.title for d in sheet.state.drafted.values()] == ["two"]
    sheet.write("drop", id=2, why="conflict")
    assert not sheet.state.drafted and sheet.state.asked == 2


# Money


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(st.tuples(st.floats(0.001, 3), st.none() | st.floats(0, 1)), max_size=12), limit=st.floats(0, 6))
def test_the_purse_never_passes_its_limit(calls: list[tuple[float, float | None]], limit: float) -> None:
    """Each call reserves its worst case, then settles for a share of it, or dies before the answer (None)."""
    with tempfile.TemporaryDirectory() as folder:
        book = Ledger(Journal(Path(folder) / "journal.jsonl"))
        begin(book)
        spent = 0.0
        for worst, share in calls:
            purse = Purse(book, limit)
            call = purse.reserve(worst)
            assert (call is None) == (spent + worst > limit)
            if call is None:
                continue
            spent += worst
            assert book.state.usd == pytest.approx(spent) and spent <= limit
            if share is not None:
                purse.settle(call, worst * share, {})
                spent = book.state.usd
        assert fold(parse(book._journal.path.read_bytes())[0]).usd == book.state.usd <= limit
        book._journal.close()


def test_a_reservation_without_an_answer_counts_in_full() -> None:
    sheet = Sheet()
    begin(sheet)
    sheet.write("reserve", call="call-1", usd=2.0)
    sheet.write("reserve", call="call-2", usd=3.0)
    sheet.write("settle", call="call-1", usd=0.25, detail={})
    assert sheet.state.usd == 3.25 and sheet.state.calls == 2


def test_two_threads_cannot_both_have_the_last_dollar(tmp_path: Path) -> None:
    book = Ledger(Journal(tmp_path / "journal.jsonl"))
    begin(book)
    purse = Purse(book, 10.0)
    calls: list[str | None] = []
    threads = [threading.Thread(target=lambda: calls.extend(purse.reserve(0.5) for _ in range(20))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    granted = [call for call in calls if call]
    assert len(granted) == len(set(granted)) == 20 and book.state.usd == 10.0


def test_without_a_limit_everything_is_granted(tmp_path: Path) -> None:
    book = Ledger(Journal(tmp_path / "journal.jsonl"))
    begin(book)
    assert Purse(book, None).reserve(1e6) == "call-1"


def test_history_is_what_became_of_finished_runs() -> None:
    sheet = night(1.0, 1.001, 0.999)
    play(sheet, Reject("crash", "boom"))
    draft(sheet)
    start(sheet, decide.next(sheet.state, 0.0))  # in flight: not history yet
    history = sheet.state.history()
    assert [(p.number, p.kind, p.status) for p in history[2:]] == [(3, "baseline", "keep"), (4, "candidate", "crash")]
    assert history[2].score == pytest.approx(0.999) and history[3].score is None
    assert (history[3].title, history[3].reason) == ("change 1", "boom")


def test_beliefs_of_ancestors_age_with_every_run() -> None:
    sheet = night(1.0, 1.001, 0.999)
    play(sheet, scored(0.99))
    first = sheet.state.stack[0].belief
    assert isinstance(first, Belief)
    play(sheet, scored(1.1))
    play(sheet, Reject("crash", "boom"))
    aged = sheet.state.stack[0].belief
    assert aged is not None and aged.m == first.m
    assert aged.s2 == pytest.approx(first.s2 + 2 * decide.DRIFT * decide.variance(sheet.state))
