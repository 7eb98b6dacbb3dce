"""How a night ends: its limits, its claims, and what is true of whole nights by the hundred."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import accumulate
from statistics import fmean, stdev
from typing import Any

import pytest
from simulated import CRASH, FIRST, Sheet, World, begin, believed, night, play, scored, whole

from nightshift import decide
from nightshift.ledger import State
from nightshift.values import Reject

near = pytest.approx
T_TABLE = [  # any printed table of Student's t
    (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 6, 2.4469), (0.975, 14, 2.1448), (0.975, 18, 2.1009),
    (0.975, 120, 1.9799), (0.99, 1, 31.8205), (0.99, 3, 4.5407), (0.99, 7, 2.9980), (0.99, 9, 2.8214),
    (0.95, 5, 2.0150), (0.9, 10, 1.3722), (0.995, 4, 4.6041), (0.75, 13, 0.6938),
]  # fmt: skip


def claiming(*pairs: tuple[float, float], keep: float = 0.98, **rules: Any) -> Sheet:
    """A night with one keep and a claim of (first, final) scores on test; val lies 0.5 above."""
    sheet = night(1.0, 1.0, 1.0, **{"max_experiments": 1, "claim_per_arm": len(pairs)} | rules)
    play(sheet, scored(keep))
    arms = {"first": [first for first, _ in pairs], "final": [final for _, final in pairs]}
    while (task := decide.next(sheet.state, 0.0)).kind == "claim":
        test = arms[task.arm].pop(0)
        play(sheet, scored(test + 0.5, test=test))
    return sheet


# Limits


@pytest.mark.parametrize(("runs", "arm"), [
    (6, 0), (30, 0), (49, 0), (50, 4), (57, 4), (100, 7), (110, 8), (143, 10), (1000, 10),
])  # fmt: skip
def test_claim_runs(runs: int, arm: int) -> None:
    hours = runs * 300.0 / 3600
    assert decide.claim_runs(runs, None, 300.0, None) == arm
    assert decide.claim_runs(None, hours, 300.0, None) == arm
    assert decide.claim_runs(runs, 1000.0, 300.0, None) == arm
    assert decide.claim_runs(10_000, hours, 300.0, None) == arm


def test_claim_runs_without_limits_or_as_the_profile_says() -> None:
    assert decide.claim_runs(None, None, 300.0, None) == 10
    assert decide.claim_runs(6, None, 8.0, 3) == 3
    assert decide.claim_runs(6, None, 8.0, 0) == 0
    assert decide.claim_runs(6, None, 8.0, 1) == 0  # one run an arm has no interval


def test_max_experiments_counts_candidates_that_count() -> None:
    sheet = night(1.0, 1.0, 1.0, max_experiments=3)
    play(sheet, scored(1.1))
    play(sheet, scored(1.1), unhealthy="hot")
    play(sheet, scored(1.1))
    assert decide.next(sheet.state, 0.0).kind == "candidate"
    play(sheet, CRASH)
    task = decide.next(sheet.state, 0.0)
    assert (task.kind, task.why) == ("end", "--max-experiments 3 are done")


def test_max_hours_leaves_time_for_the_run_at_hand_and_once_something_is_kept_for_the_claim() -> None:
    sheet = night(1.0, 1.0, 1.0, max_hours=1.0, claim_per_arm=4)
    begun, run_s = sheet.state.leg["at"], 10.0
    assert decide.next(sheet.state, begun + 3600 - run_s).kind == "candidate"
    task = decide.next(sheet.state, begun + 3600 - run_s + 0.1)
    assert (task.kind, task.why) == ("end", "--max-hours 1 are used")
    play(sheet, scored(0.98))
    assert decide.next(sheet.state, begun + 3600 - 9 * run_s).kind == "candidate"
    assert decide.next(sheet.state, begun + 3600 - 9 * run_s + 0.1).kind == "claim"


def test_crashes_do_not_make_the_claim_look_short() -> None:
    sheet = night(1.0, 1.0, 1.0, max_hours=1.0, claim_per_arm=4)
    play(sheet, scored(0.98))
    begun = sheet.state.leg["at"]
    for _ in range(5):
        play(sheet, CRASH, total_s=1.0)
    assert decide.next(sheet.state, begun + 3600 - 89.9).kind == "claim"
    assert decide.next(sheet.state, begun + 3600 - 90.0).kind == "candidate"


def test_a_claim_once_begun_is_finished_whatever_the_clock_says() -> None:
    sheet = night(1.0, 1.0, 1.0, max_experiments=1, max_hours=1.0, claim_per_arm=2)
    play(sheet, scored(0.98))
    play(sheet, scored(0.98, test=0.98))
    sheet.write("leg", pid=2, sandbox="", limits={"max_experiments": 50, "max_hours": 9.0}, proposer="knobs")
    assert [decide.next(sheet.state, now).kind for now in (0.0, 1e12)] == ["claim", "claim"]


def test_a_proposer_with_nothing_more_ends_the_search_of_its_leg_alone() -> None:
    sheet = night(1.0, 1.0, 1.0)
    sheet.write("exhausted", why="replay has nothing more to propose")
    task = decide.next(sheet.state, 0.0)
    assert (task.kind, task.why) == ("end", "replay has nothing more to propose")
    sheet.write("leg", pid=2, sandbox="", limits=sheet.state.leg["limits"], proposer="knobs")
    assert decide.next(sheet.state, 0.0).kind == "candidate"


# Claims


def test_the_claim_runs_abba_on_fresh_seeds_and_both_splits() -> None:
    sheet = night(1.0, 1.0, 1.0, max_experiments=1, claim_per_arm=5)
    play(sheet, scored(0.98))
    arms = []
    while (task := decide.next(sheet.state, 0.0)).kind == "claim":
        assert task.splits == ("val", "test")
        assert (task.blob, task.parent) == ((f"{FIRST}/1", 4) if task.arm == "final" else (FIRST, 0))
        assert task.seed not in {row.seed for row in sheet.state.rows}
        arms.append(task.arm)
        belief, sigma2 = believed(sheet.state), decide.variance(sheet.state)
        play(sheet, scored(5.0, test=5.0))
        assert (believed(sheet.state), decide.variance(sheet.state)) == (belief, sigma2)  # steering learns nothing
    assert arms == ["final", "first", "first", "final"] * 2 + ["final", "first"]
    assert task.kind == "end"


@pytest.mark.parametrize(("p", "df", "t"), T_TABLE)
def test_t_against_a_printed_table(p: float, df: int, t: float) -> None:
    assert decide.t_quantile(p, df) == near(t, abs=1e-4 if t < 20 else 1e-3)
    assert decide.t_cdf(t, df) == near(p, abs=1e-5)
    assert decide.t_cdf(-t, df) == near(1 - p, abs=1e-5)


def test_the_interval_is_the_pooled_t_interval() -> None:
    pairs = [(1.0, 0.99), (1.002, 0.985), (0.998, 0.995), (1.004, 0.99)]
    told = decide.claim(claiming(*pairs).state, "--max-experiments 1 are done")
    first, final = [a for a, _ in pairs], [b for _, b in pairs]
    pooled = math.sqrt((stdev(first) ** 2 + stdev(final) ** 2) / 2)
    half = 2.446912 * pooled * math.sqrt(2 / 4)
    delta = fmean(final) - fmean(first)
    for split_name, shift in (("test", 0.0), ("val", 0.5)):
        got = told[split_name]
        assert (got["delta"], got["low"], got["high"]) == near((delta, delta - half, delta + half))
        assert (got["first"], got["final"]) == near((fmean(first) + shift, fmean(final) + shift))
    assert (told["verdict"], told["per_arm"], told["commit"]) == ("better", 4, "keep-4")
    assert told["why"] == "--max-experiments 1 are done"


@pytest.mark.parametrize(("shift", "verdict"), [(-0.01, "better"), (0.0, "no difference shown"), (0.01, "worse")])
def test_the_verdict_is_the_test_splits_interval(shift: float, verdict: str) -> None:
    pairs = [(1.0, 1.001 + shift), (1.002, 0.999 + shift), (0.998, 1.0 + shift), (1.0, 1.0 + shift)]
    assert decide.claim(claiming(*pairs).state, "")["verdict"] == verdict


def test_no_keep_no_claim() -> None:
    sheet = night(1.0, 1.0, 1.0, max_experiments=1, claim_per_arm=4)
    play(sheet, scored(1.1))
    assert decide.next(sheet.state, 0.0).kind == "end"
    assert decide.claim(sheet.state, "")["verdict"] == "no keep, no claim"


def test_too_short_to_claim() -> None:
    sheet = night(1.0, 1.0, 1.0, max_experiments=30, sentinel_every=100)
    for bpb in [0.98] + [1.1] * 29:
        play(sheet, scored(bpb))
    assert decide.next(sheet.state, 0.0).kind == "end"
    assert decide.claim(sheet.state, "")["verdict"].startswith("too short to claim")


def test_a_claim_run_that_crashes_is_made_again_but_not_for_ever() -> None:
    sheet = night(1.0, 1.0, 1.0, max_experiments=1, claim_per_arm=4)
    play(sheet, scored(0.98))
    for outcome in (CRASH, scored(0.98, test=0.98), CRASH):
        before = decide.next(sheet.state, 0.0)
        play(sheet, outcome)
        assert (decide.next(sheet.state, 0.0).arm == before.arm) == isinstance(outcome, Reject)
    for _ in range(10):
        if decide.next(sheet.state, 0.0).kind == "end":
            break
        play(sheet, CRASH)
    assert decide.next(sheet.state, 0.0).kind == "end"
    assert "claim runs failed" in decide.claim(sheet.state, "")["verdict"]


def test_a_night_that_is_over_stays_over() -> None:
    sheet = claiming((1.0, 0.98), (1.0, 0.981))
    sheet.write("claim", **decide.claim(sheet.state, "done"))
    sheet.write("leg", pid=2, sandbox="", limits={"max_experiments": 500, "max_hours": None}, proposer="knobs")
    assert sheet.state.over and decide.next(sheet.state, 0.0).kind == "end"


# Whole nights


SIGMA = 0.003


def nights_of(count: int, effect: float, spread: float, drift: float = 0.0) -> list[tuple[World, State]]:
    """Nights of 110 candidates whose effects are N(effect, spread²), on a machine that drifts; all in σ."""
    lived = []
    for seed in range(count):
        effects = [random.Random(f"{seed}:effect:{i}").gauss(effect, spread) * SIGMA for i in range(111)]
        steps = random.Random(f"{seed}:drift")
        offsets = tuple(accumulate(steps.gauss(0.0, drift * SIGMA) for _ in range(160)))
        world = World(seed, SIGMA, effects.__getitem__, offsets=offsets)
        sheet = Sheet()
        begin(sheet, seed, max_experiments=110, sigma0=SIGMA)
        lived.append((world, whole(sheet, world)))
    return lived


def surprises(lived: list[tuple[World, State]]) -> list[float]:
    """How far each night's last belief is from the truth, in its own standard deviations; positive: too hopeful."""
    found = []
    for world, state in lived:
        last = max(row.number for row in state.rows if row.kind != "claim")
        truth = world.truth(state.incumbent.blob) + world.offsets[last]
        found.append((truth - believed(state).m) / math.sqrt(believed(state).s2))
    return found


@pytest.mark.slow
def test_nights_in_which_nothing_helps_hardly_ever_claim_a_gain() -> None:
    claims = [state.claim for _, state in nights_of(120, 0.0, 0.0) if state.claim and "test" in state.claim]
    verdicts = Counter(str(claim["verdict"]) for claim in claims)
    n = len(claims)
    assert n > 100  # steering is generous: it keeps something in nearly every one of them
    assert verdicts["better"] <= 0.025 * n + 4 * math.sqrt(0.025 * n)
    assert verdicts["worse"] <= 0.025 * n + 4 * math.sqrt(0.025 * n)
    assert abs(fmean(claim["test"]["delta"] for claim in claims)) < 4 * SIGMA / 2 / math.sqrt(n)


def test_without_keeps_the_belief_tracks_a_drifting_machine() -> None:
    """Candidates so bad that none is kept: baselines, drift and sentinels alone, a Kalman filter in its own world."""
    found = surprises(nights_of(60, 1000.0, 0.0, math.sqrt(decide.DRIFT)))
    assert abs(fmean(found)) < 4 / math.sqrt(len(found))
    assert abs(fmean(z * z for z in found) - 1) < 4 * math.sqrt(2 / len(found))


@pytest.mark.slow
def test_a_nights_belief_is_too_hopeful_by_a_standard_deviation_and_its_claim_is_not() -> None:
    """Effects and drift are what the rule assumes. A keep's belief is honest when it is made (test_decide says so), but
    discards say nothing to it, though many of them mean that the incumbent was lucky. Therefore no belief is reported.
    """
    lived = nights_of(120, 0.0, 1.0, math.sqrt(decide.DRIFT))
    found = surprises(lived)
    assert 0.3 < fmean(found) < 1.5 and fmean(z * z for z in found) < 3
    missed, gains = 0, []
    for world, state in lived:
        assert state.claim is not None and "test" in state.claim
        gains.append(world.truth(state.incumbent.blob) - world.truth(FIRST))
        missed += not state.claim["test"]["low"] <= gains[-1] <= state.claim["test"]["high"]
    assert missed <= 0.05 * len(gains) + 4 * math.sqrt(0.05 * len(gains))
    assert fmean(gains) < -15 * SIGMA


@pytest.mark.slow
def test_nights_in_which_most_edits_do_a_little_harm_do_not_walk_downhill() -> None:
    gains = [world.truth(state.incumbent.blob) - world.truth(FIRST) for world, state in nights_of(60, 0.3, 0.5)]
    assert fmean(gains) < 0
