"""What a score means: each formula of the steering against an independent computation."""

from __future__ import annotations

import math
import random
from statistics import NormalDist, fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import CRASH, FIRST, SIGMA0, Sheet, begin, believed, demo, judged, night, play, scored

from nightshift import decide, opening
from nightshift.values import Belief, Reject, Score

near = pytest.approx


# Noise


def test_sigma_of_baselines_and_sentinels() -> None:
    sheet = night(1.0, 1.002, 0.997, sentinel_every=1)
    mean = (1.0 + 1.002 + 0.997) / 3
    ss = sum((y - mean) ** 2 for y in (1.0, 1.002, 0.997))
    assert decide.variance(sheet.state) == near((4 * SIGMA0**2 + ss) / (4 + 2))
    play(sheet, scored(1.1))  # a candidate's draw tells nothing of the noise
    assert decide.variance(sheet.state) == near((4 * SIGMA0**2 + ss) / (4 + 2))
    play(sheet, scored(1.004))  # a sentinel of the same train.py joins its baselines
    mean = fmean([1.0, 1.002, 0.997, 1.004])
    ss = sum((y - mean) ** 2 for y in (1.0, 1.002, 0.997, 1.004))
    assert decide.variance(sheet.state) == near((4 * SIGMA0**2 + ss) / (4 + 3))


def test_sentinels_of_a_keep_vary_about_their_own_mean() -> None:
    sheet = night(1.0, 1.0, 1.0, sentinel_every=1)
    play(sheet, scored(0.98))
    for y in (0.98, 0.984):
        play(sheet, scored(y))  # a sentinel
        play(sheet, scored(1.1))
    ss = 2 * 0.002**2
    assert decide.variance(sheet.state) == near((4 * SIGMA0**2 + ss) / (4 + 2 + 1))


def test_sigma_before_anything_has_run_is_the_profiles() -> None:
    assert decide.variance(night().state) == near(SIGMA0**2)


def test_runs_that_do_not_count_or_crashed_tell_nothing_of_the_noise() -> None:
    sheet = night(1.0, 1.002, sentinel_every=1)
    before = decide.variance(sheet.state)
    play(sheet, scored(1.1))
    play(sheet, scored(5.0), unhealthy="throttled")  # the sentinel
    assert decide.variance(sheet.state) == near(before)
    play(sheet, CRASH)
    assert decide.variance(sheet.state) == near(before)


def test_baselines_of_earlier_nights_count() -> None:
    sheet = Sheet()
    begin(sheet, prior=(3e-5, 5), sigma0=SIGMA0, baselines=2)
    assert decide.variance(sheet.state) == near((4 * SIGMA0**2 + 3e-5) / (4 + 5))
    for y in (1.0, 1.002):
        play(sheet, scored(y))
    assert decide.variance(sheet.state) == near((4 * SIGMA0**2 + 3e-5 + 2 * 0.001**2) / (4 + 5 + 1))


def test_what_a_new_night_learns_from_earlier_ones() -> None:
    earlier = [night(1.0, 1.002, 0.998).state, night(2.0, 2.004, tag="nov19").state]
    assert opening._repeats(earlier, FIRST) == {"ss": near(2 * 0.002**2 + 2 * 0.002**2), "df": 3}
    assert opening._repeats(earlier, "another train.py") == {"ss": 0.0, "df": 0}
    ss = 2 * 0.002**2 + 2 * 0.002**2
    assert opening._sigma0(demo(sigma0=SIGMA0), earlier) == near(math.sqrt((4 * SIGMA0**2 + ss) / (4 + 3)))
    assert opening._sigma0(demo(sigma0=SIGMA0), []) == near(SIGMA0)


# The belief


def test_the_first_belief_is_the_baselines_mean() -> None:
    sheet = night(1.0, 1.003, 0.996)
    belief = believed(sheet.state)
    assert belief.m == near(fmean([1.0, 1.003, 0.996]))
    assert belief.s2 == near(decide.variance(sheet.state) / 3)


def test_a_discard_leaves_the_mean_and_adds_the_machines_drift() -> None:
    for outcome in (scored(1.1), CRASH, Reject("timeout", "late"), Reject("invalid", "shape")):
        sheet = night(1.0, 1.0, 1.0)
        before = believed(sheet.state)
        decision = play(sheet, outcome)
        assert decision.status == "discard" if isinstance(outcome, Score) else outcome.status
        after = believed(sheet.state)
        assert after.m == before.m and after.s2 == near(before.s2 + 0.01 * decide.variance(sheet.state))


def test_a_run_that_does_not_count_is_a_run_to_the_machine() -> None:
    sheet = night(1.0, 1.0, 1.0)
    before = believed(sheet.state)
    play(sheet, scored(0.5), unhealthy="a stranger's process")
    after = believed(sheet.state)
    assert after.m == before.m and after.s2 == near(before.s2 + 0.01 * decide.variance(sheet.state))


# Keep or discard


@settings(max_examples=300, deadline=None)
@given(gain=st.floats(-8, 8), s=st.floats(0.05, 2), lines=st.integers(-40, 80), sigma=st.floats(1e-4, 10))
def test_the_keep_rule(gain: float, s: float, lines: int, sigma: float) -> None:
    """The rule of the design, in σ: keep when g τ² / (τ² + σ² + s²) > c with τ = σ."""
    decision = decide._candidate(5.0 - gain * sigma, Belief(5.0, (s * sigma) ** 2), sigma**2, lines, sigma**2)
    cost = 0.0 if lines < 0 else min(0.3, 0.1 + 0.005 * lines)
    shrunk = gain / (1 + 1 + s * s)
    assert decision.delta == near(-gain * sigma, abs=1e-9)
    assert decision.age == near(0.01 * sigma**2)
    assert decision.belief is not None and decision.p_better is not None
    if abs(shrunk - cost) > 1e-6:
        assert decision.status == ("keep" if shrunk > cost else "discard")
    if decision.status == "keep":
        w = (1 + s * s) / (2 + s * s)
        assert decision.belief.m == near(5.0 - w * gain * sigma)
        assert decision.belief.s2 == near(w * sigma**2)
    else:
        assert decision.belief == Belief(5.0, (s * sigma) ** 2)


@pytest.mark.parametrize(("lines", "cost"), [
    (0, 0.1), (1, 0.105), (20, 0.2), (40, 0.3), (41, 0.3), (1000, 0.3), (-1, 0.0), (-500, 0.0),
])  # fmt: skip
def test_what_lines_cost(lines: int, cost: float) -> None:
    assert decide.threshold(lines) == near(cost)


def test_the_keep_rule_in_a_night_uses_the_aged_belief() -> None:
    sheet = night(1.0, 1.002, 0.998)
    sigma2 = decide.variance(sheet.state)
    s2 = believed(sheet.state).s2 + 0.01 * sigma2
    cost = (0.1 + 0.005 * 10) * math.sqrt(sigma2)
    edge = 1.0 - cost * (2 * sigma2 + s2) / sigma2
    task = decide.next(sheet.state, 0.0)
    assert judged(sheet.state, task, scored(edge + 1e-7), 10).status == "discard"
    kept = judged(sheet.state, task, scored(edge - 1e-7), 10)
    assert kept.status == "keep"
    w = (sigma2 + s2) / (2 * sigma2 + s2)
    assert kept.belief is not None
    assert kept.belief.m == near(1.0 - w * (1.0 - edge), abs=1e-6) and kept.belief.s2 == near(w * sigma2)
    assert judged(sheet.state, task, scored(edge), 0).status == "keep"
    assert judged(sheet.state, task, scored(1.0 - 1e-9), -1).status == "keep"
    assert judged(sheet.state, task, scored(1.0 + 1e-9), -1).status == "discard"


def test_p_better_by_integration() -> None:
    """P(gain > 0 | draw) with a prior N(0, τ²) and noise σ² + s², by the midpoint rule."""
    sigma, s2 = 0.7, 0.2
    for gain in (-1.5, -0.2, 0.0, 0.4, 2.0):
        noise = NormalDist(0, math.sqrt(sigma**2 + s2))
        grid = [(i + 0.5) / 400 for i in range(-4000, 4000)]
        density = [NormalDist(0, sigma).pdf(g) * noise.pdf(gain - g) for g in grid]
        better = sum(d for g, d in zip(grid, density, strict=True) if g > 0) / sum(density)
        decision = decide._candidate(-gain, Belief(0.0, s2), sigma**2, 0, sigma**2)
        assert decision.p_better == near(better, abs=1e-4)


def test_steering_is_calibrated_where_its_prior_is_true() -> None:
    """20,000 candidates from the prior: the belief after a keep is honest although keeps are chosen, and so is p."""
    dice, sigma, s = random.Random(7), 1.0, 0.6
    surprise, claimed, better = [], [], []
    for _ in range(20_000):
        incumbent = dice.gauss(0.0, s)
        truth = incumbent + dice.gauss(0.0, sigma)
        decision = decide._candidate(truth + dice.gauss(0.0, sigma), Belief(0.0, s * s), sigma**2, 5, sigma**2)
        assert decision.p_better is not None and decision.belief is not None
        claimed.append(decision.p_better)
        better.append(truth < incumbent)
        if decision.status == "keep":
            surprise.append((truth - decision.belief.m) / math.sqrt(decision.belief.s2))
    error = 1 / math.sqrt(len(surprise))
    assert len(surprise) > 5000
    assert abs(fmean(surprise)) < 4 * error
    assert abs(fmean(z * z for z in surprise) - 1) < 4 * math.sqrt(2) * error
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = [i for i, p in enumerate(claimed) if low <= p < low + 0.2]
        share, told = fmean(better[i] for i in inside), fmean(claimed[i] for i in inside)
        assert abs(share - told) < 4 * math.sqrt(0.25 / len(inside))


# Sentinels


@pytest.mark.parametrize("surprise", [0.0, 0.5, -0.5, 2.9, 3.1, -3.1, 40.0, -40.0])
def test_a_sentinel_is_a_kalman_step_with_a_clipped_innovation(surprise: float) -> None:
    sheet = night(1.0, 1.002, 0.998, sentinel_every=1)
    play(sheet, scored(1.1))
    sigma2 = decide.variance(sheet.state)
    m, p = believed(sheet.state).m, believed(sheet.state).s2 + 0.01 * sigma2
    spread = math.sqrt(p + sigma2)
    decision = play(sheet, scored(m + surprise * spread))
    clipped = max(-3.0, min(3.0, surprise)) * spread
    k = p / (p + sigma2)
    after = believed(sheet.state)
    assert after.m == near(m + k * clipped) and after.s2 == near((1 - k) * p)
    assert (decision.status, decision.takes_back, decision.p_better) == ("keep", 0, None)
    assert decision.delta == near(surprise * spread)


def test_a_keep_behind_its_parent_is_taken_back() -> None:
    sheet = night(1.0, 1.0, 1.0, sentinel_every=1)
    play(sheet, scored(0.996))
    assert sheet.state.keeps
    parent, sigma2 = sheet.state.stack[0].belief, decide.variance(sheet.state)
    m, p = believed(sheet.state).m, believed(sheet.state).s2 + 0.01 * sigma2
    assert parent is not None
    behind = m + (parent.m - m) * (p + sigma2) / p  # where the Kalman step lands on the parent's mean
    task = decide.next(sheet.state, 0.0)
    assert judged(sheet.state, task, scored(behind - 1e-7)).takes_back == 0
    assert judged(sheet.state, task, scored(behind + 1e-7)).takes_back == 4
    play(sheet, scored(behind + 1e-7))
    assert not sheet.state.keeps
    assert believed(sheet.state).m == parent.m
    assert believed(sheet.state).s2 == near(parent.s2 + 0.01 * sigma2)


def test_a_keep_that_has_survived_two_sentinels_is_not_taken_back() -> None:
    sheet = night(1.0, 1.0, 1.0, sentinel_every=1)
    play(sheet, scored(0.996))
    for _ in range(2):
        play(sheet, scored(0.999))
        play(sheet, scored(1.1))
    assert play(sheet, scored(1.02)).takes_back == 0  # a third, that puts it behind
    assert believed(sheet.state).m > 1.0
    assert [keep.number for keep in sheet.state.keeps] == [4]


def test_only_the_newest_keep_is_taken_back_and_the_one_below_keeps_its_checks() -> None:
    sheet = night(1.0, 1.0, 1.0, sentinel_every=1)
    play(sheet, scored(0.99))
    play(sheet, scored(0.994))  # one check survived
    play(sheet, scored(0.990))
    assert [keep.number for keep in sheet.state.keeps] == [4, 6]
    play(sheet, scored(1.05))
    assert [(keep.number, keep.sentinels) for keep in sheet.state.keeps] == [(4, 1)]


def test_a_gain_that_nobody_believes_is_measured_again_under_another_seed() -> None:
    sheet = night(1.0, 1.0, 1.0)
    first = play(sheet, scored(0.9))
    assert first.status == "discard" and first.length == 1.0 and "measured again" in first.reason
    assert not sheet.state.keeps and not sheet.state.of("candidate") and sheet.state.incumbent.belief.m == near(1.0)
    task, row = decide.next(sheet.state, 0.0), sheet.state.rows[-1]
    assert task.again and task.blob == row.blob and task.seed != row.seed and task.kind == "candidate"
    second = play(sheet, scored(0.904))
    assert second.status == "keep" and sheet.state.keeps
    assert second.belief is not None and second.belief.m == near(0.904, abs=0.0004)  # hardly shrunk: it is that large
    assert play(sheet, scored(0.907)).status == "discard"  # of that incumbent it would be a loss


def test_a_gain_that_was_luck_is_not_kept() -> None:
    sheet = night(1.0, 1.0, 1.0)
    play(sheet, scored(0.9))
    assert play(sheet, scored(1.0005)).status == "discard" and not sheet.state.keeps
    assert decide.next(sheet.state, 0.0).again is False  # that one is done with
    assert play(sheet, scored(0.9)).length == 1.0  # another one is looked at twice as well


def test_a_sentinel_comes_after_every_tenth_candidate_whatever_became_of_it() -> None:
    sheet, kinds = night(1.0, 1.0, 1.0), []
    for i in range(24):
        kinds.append(decide.next(sheet.state, 0.0).kind)
        play(sheet, CRASH if i % 3 == 0 else scored(1.1), unhealthy="hot" if i % 5 == 1 else "")
    counted = [row for row in sheet.state.rows if row.counts and row.kind != "baseline"]
    before = 0
    for row in counted:
        assert (row.kind == "sentinel") == (before > 0 and before % 10 == 0), row.number
        before = 0 if row.kind == "sentinel" else before + 1
    assert "sentinel" in kinds and "candidate" in kinds


def test_a_sentinel_runs_the_incumbent_under_a_seed_of_its_own() -> None:
    sheet = night(1.0, 1.0, 1.0, sentinel_every=1)
    play(sheet, scored(0.98))
    task = decide.next(sheet.state, 0.0)
    assert (task.kind, task.parent, task.blob, task.splits) == ("sentinel", 4, f"{FIRST}/1", ("val",))
    assert task.seed not in {row.seed for row in sheet.state.rows}


# Runs that do not count


@pytest.mark.parametrize("kind", ["baseline", "candidate", "sentinel", "claim"])
def test_a_run_on_an_unhealthy_device_is_made_again_whatever_its_score(kind: str) -> None:
    sheet = night(1.0, 1.0, 1.0, sentinel_every=1, max_experiments=2, claim_per_arm=2)
    if kind == "baseline":
        sheet = night(baselines=3)
    outcomes = {"candidate": 0, "sentinel": 1, "claim": 3}
    for _ in range(outcomes.get(kind, 0)):
        play(sheet, scored(0.98))
    task, before = decide.next(sheet.state, 0.0), sheet.state.incumbent
    assert task.kind == kind
    for bpb in (0.1, 9.0):
        decision = judged(sheet.state, task, scored(bpb, test=bpb), unhealthy="a stranger's process")
        assert decision.length == task.length and decision.takes_back == 0
        assert decision.reason == "does not count: a stranger's process"
    play(sheet, scored(0.1, test=0.1), unhealthy="a stranger's process")
    again = decide.next(sheet.state, 0.0)
    ran = sheet.state.rows[-1]
    assert (again.kind, again.blob, again.arm, again.splits) == (kind, ran.blob, task.arm, task.splits)
    assert (again.number, again.attempt, again.again) == (task.number + 1, 1, True)
    assert again.seed != task.seed
    assert not ran.counts and sheet.state.incumbent.number == before.number
    assert sheet.state.of(task.kind) == [row for row in sheet.state.rows[:-1] if row.kind == kind]
    play(sheet, scored(0.98, test=0.98))
    assert sheet.state.rows[-1].counts and sheet.state.again is None


def test_repeating_ends() -> None:
    sheet = night(1.0, 1.0, 1.0)
    lengths = [play(sheet, scored(1.1), unhealthy="hot").length for _ in range(4)]
    assert lengths == [1.0, 1.0, 1.0, None]
    assert play(sheet, scored(1.1), unhealthy="hot").length == 1.0  # the next candidate has its own
