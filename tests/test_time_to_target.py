"""time_to_target: loss priced in seconds, runs re-aimed at the target, and the gate of the claim."""

from __future__ import annotations

import math
import random
from statistics import fmean
from typing import Any

import pytest
from simulated import Sheet, begin, believed, demo, judged, play, split

from nightshift import decide, opening
from nightshift.ledger import State
from nightshift.values import Score, Stop

TARGET = 3.28
EPSILON = 0.15  # −dL/d ln t, nats
T0 = 212.0
near = pytest.approx


def loss_at(seconds: float, noise: float = 0.0) -> float:
    """Of the unchanged train.py: at the target after T0."""
    return TARGET - EPSILON * math.log(seconds / T0) + noise


def ran(seconds: float, loss: float | None = None) -> Score:
    value = loss_at(seconds) if loss is None else loss
    return Score({"val": split(0.0, value), "test": split(0.0, value)}, seconds)


def night(noise: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0), **rules: Any) -> Sheet:
    """A night whose baselines lie on the curve, but for this much noise in their losses."""
    sheet = Sheet()
    known: dict[str, Any] = {"objective": "time_to_target", "baselines": 4, "sigma0": 2.0, "budget_s": 300.0,
                             "max_experiments": 110, "target_loss": TARGET}
    begin(sheet, **known | rules)
    for deviation in noise:
        length = decide.next(sheet.state, 0.0).length
        play(sheet, ran(T0 * length, loss_at(T0 * length, deviation)))
    return sheet


def test_baselines_are_run_short_long_long_short() -> None:
    assert [row.length for row in night().state.rows] == [0.97, 1.03, 1.03, 0.97]


def test_the_price_of_loss_is_recovered_from_the_baselines() -> None:
    state = night().state
    price = decide.price_of_loss(state, decide._baselines(state))
    assert price == near(fmean([0.97, 1.03, 1.03, 0.97]) * T0 / EPSILON)


def test_the_price_of_loss_is_the_least_squares_slope() -> None:
    noise = (0.001, -0.002, 0.0015, 0.0005)
    state = night(noise).state
    log_t = [math.log(T0 * k) for k in (0.97, 1.03, 1.03, 0.97)]
    losses = [loss_at(math.exp(x), e) for x, e in zip(log_t, noise, strict=True)]
    n, sx, sy = 4, sum(log_t), sum(losses)
    sxy, sxx = sum(x * y for x, y in zip(log_t, losses, strict=True)), sum(x * x for x in log_t)
    slope = (n * sxy - sx * sy) / (n * sxx - sx * sx)  # the textbook's formula
    assert decide.price_of_loss(state, decide._baselines(state)) == near(T0 / -slope, rel=1e-6)


def test_before_three_baselines_there_is_no_price() -> None:
    for count in (0, 1, 2):
        state = night((0.0,) * count).state
        assert decide.price_of_loss(state, decide._baselines(state)) is None
    state = night((0.0,) * 3).state
    assert decide.price_of_loss(state, decide._baselines(state)) is not None


def test_the_score_is_the_seconds_that_the_target_itself_would_have_taken() -> None:
    sheet = night()
    price = decide.price_of_loss(sheet.state, decide._baselines(sheet.state))
    assert price is not None
    task = decide.next(sheet.state, 0.0)
    for seconds, loss in ((200.0, TARGET), (200.0, TARGET + 0.003), (230.0, TARGET - 0.0039)):
        decision = judged(sheet.state, task, ran(seconds, loss))
        assert decision.score == near(seconds + price * (loss - TARGET), abs=1e-6)
        assert decision.delta == near(seconds + price * (loss - TARGET) - believed(sheet.state).m, abs=1e-6)


def test_the_noise_of_time_is_what_loss_leaves_after_the_slope() -> None:
    noise = (0.002, 0.002, -0.002, -0.002)  # both lengths deviate alike: the slope is not moved
    state = night(noise).state
    runs = [(row.train_s, row.scores["val"].loss) for row in state.rows]
    scores = [seconds + T0 / EPSILON * (loss - TARGET) for seconds, loss in runs]
    ss = sum((u - fmean(scores)) ** 2 for u in scores)
    assert decide.variance(state) == near((4 * 2.0**2 + ss) / (4 + 4 - 1 - 1), rel=1e-6)
    assert believed(state).m == near(fmean(scores)) and believed(state).s2 == near(decide.variance(state) / 4)


def test_the_lengths_of_the_baselines_are_not_noise_to_a_later_night() -> None:
    """Seconds of ±3% length are 7 s apart here; at equal loss they are not apart at all."""
    earlier = [night().state, night(tag="nov21").state]
    assert opening._repeats(earlier, "first") == {"ss": near(0.0, abs=0.02), "df": 4}
    assert opening._sigma0(demo(sigma0=2.0), earlier) == near(math.sqrt(4 * 2.0**2 / (4 + 4)), abs=1e-3)


# Re-aiming


@pytest.mark.parametrize("miss", [0.0041, 0.02, -0.0041, -0.05])
def test_a_run_off_the_target_is_made_again_at_a_length_that_meets_it(miss: float) -> None:
    sheet = night()
    task = decide.next(sheet.state, 0.0)
    decision = play(sheet, ran(200.0, TARGET + miss))
    assert decision.length == near(task.length * math.exp(miss / EPSILON), rel=1e-2)
    again = decide.next(sheet.state, 0.0)
    assert (again.kind, again.again, again.length) == ("candidate", True, decision.length)
    kept = play(sheet, ran(200.0, TARGET))
    assert kept.status == "keep" and sheet.state.incumbent.length == decision.length
    assert decide.next(sheet.state, 0.0).length == decision.length


@pytest.mark.parametrize("miss", [0.0039, -0.0039, 0.0])
def test_a_run_near_the_target_is_corrected_and_counts(miss: float) -> None:
    assert play(night(), ran(200.0, TARGET + miss)).length is None


@pytest.mark.parametrize(("slope", "loss", "factor"), [(EPSILON, 11.0, 2.0), (0.0, 4.5, 2.0), (0.0, 2.0, 0.5)])
def test_a_length_is_never_aimed_out_of_this_world(slope: float, loss: float, factor: float) -> None:
    sheet = Sheet()
    begin(sheet, objective="time_to_target", baselines=4, sigma0=2.0, max_experiments=110)
    for k in (0.97, 1.03, 1.03, 0.97):
        play(sheet, ran(T0 * k, TARGET - slope * math.log(k)))
    assert play(sheet, ran(200.0, loss)).length == near(factor)


def test_baselines_and_claims_are_never_re_aimed() -> None:
    sheet = night((0.05, 0.05, 0.05, 0.05), max_experiments=1, claim_per_arm=2)
    assert [row.counts for row in sheet.state.rows] == [True] * 4
    assert "measured again" in play(sheet, ran(200.0, TARGET)).reason
    play(sheet, ran(200.0, TARGET))
    assert decide.next(sheet.state, 0.0).kind == "claim"
    assert play(sheet, ran(200.0, TARGET + 0.05)).length is None


# The claim


def claimed(final: tuple[float, ...], seconds: float = 200.0) -> dict[str, Any]:
    """A night whose final arm trains for `seconds` and ends at these losses."""
    sheet = night(max_experiments=1, claim_per_arm=4)
    play(sheet, ran(seconds, TARGET))
    losses = list(final)
    first = [0.001, -0.001, 0.0005, -0.0005]
    while (task := decide.next(sheet.state, 0.0)).kind == "claim":
        play(sheet, ran(seconds, losses.pop(0)) if task.arm == "final" else ran(T0, TARGET + first.pop(0)))
    return decide.claim(sheet.state, "")


def test_the_claim_is_in_seconds_at_equal_loss() -> None:
    told = claimed((3.2780, 3.2785, 3.2782, 3.2783))
    price = T0 / EPSILON
    assert told["test"]["final"] == near(200 + price * (3.27825 - TARGET), rel=1e-3)
    assert told["test"]["delta"] == near(told["test"]["final"] - told["test"]["first"])
    assert told["verdict"] == "better"


def test_faster_but_not_surely_at_the_target_is_no_record() -> None:
    assert claimed((3.2810, 3.2805, 3.2812, 3.2808))["verdict"] != "better"  # misses it
    assert claimed((3.2790, 3.2812, 3.2782, 3.2810))["verdict"] != "better"  # mean 3.27985: meets it, by chance perhaps
    assert claimed((3.2790, 3.2780, 3.2785, 3.2790))["verdict"] == "better"


def test_the_gate_against_the_printed_table() -> None:
    """mean 3.278, standard error 0.0004082, t = 4.899 > 4.541 = t(0.99, 3 degrees of freedom)."""
    losses = [3.277, 3.279, 3.277, 3.279]
    error = math.sqrt(sum((y - 3.278) ** 2 for y in losses) / 3 / 4)
    assert decide.reaches(losses, 3.278 + 4.5408 * error)
    assert not decide.reaches(losses, 3.278 + 4.5406 * error)


def test_the_gate_lets_one_in_a_hundred_through_that_is_just_at_the_target() -> None:
    dice = random.Random(5)
    passed = sum(decide.reaches([dice.gauss(TARGET, 0.0013) for _ in range(8)], TARGET) for _ in range(4000))
    assert abs(passed - 40) < 4 * math.sqrt(40)


def test_a_train_py_that_ignores_its_length_stops_the_night() -> None:
    state = State(night={"config": {"objective": "time_to_target", "target_loss": 3.28}})
    draws = [decide.Draw(length, 300.0 + length / 100, 3.3, 1.0) for length in decide.LENGTHS[:3]]
    with pytest.raises(Stop, match="TOTAL_STEPS"):
        decide.price_of_loss(state, draws)
