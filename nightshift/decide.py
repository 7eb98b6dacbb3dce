"""What comes next, and what a score means. Steering is generous, claiming is strict; they never share a number.

A score is a draw: true value plus normal noise of standard deviation σ, the same for every train.py of a night. The
incumbent's true score is believed to be N(m, s²); a candidate's is that plus N(0, τ²), τ = σ. Lower is better.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any, Literal

from nightshift.ledger import Row, State
from nightshift.values import Belief, Decision, Kind, Reject, Run, Score, Stop, Task

RULES = 2  # the version of all that follows; a night's journal names the one it was decided by
PRIOR_DF = 4  # how many degrees of freedom the profile's σ₀ is worth
DRIFT = 0.01  # variance that the machine adds to a belief with each run, in σ²
REPEATED, QUARANTINED = "does not count: ", "does not count yet: "  # how a repeated run's reason begins
COST, COST_PER_LINE, COST_CAP = 0.1, 0.005, 0.3  # what a keep must gain, in σ
QUARANTINE = 10.0  # standard deviations of a gain that nobody believes at once: it is drawn again under another seed
CLIP = 3.0  # standard deviations of a sentinel's surprise that are believed
CHECKS = 2  # sentinels that a keep must survive
LENGTHS = (0.97, 1.03, 1.03, 0.97)  # of the baselines of a time_to_target night
LOSS_BAND = 0.004  # nats per token from the target, within which seconds are corrected rather than the run repeated
MAX_REPEATS = 3  # of one run that does not count, and of claim runs that fail
REAIM = math.log(2)  # a run far from the target has its length at most doubled or halved, whatever the slope says
CLAIM_SHARE, CLAIM_MIN, CLAIM_MAX = 0.07, 4, 10  # runs an arm, of the night's runs


# What comes next


def next(state: State, now: float) -> Task:  # noqa: A001  (the design's name for it, used as decide.next)
    """The next run, or the end. `now` is seconds since the epoch, as in the journal."""
    if state.running is not None:
        return _resumed(state.running)
    if state.over:
        return Task("end", why="its claims are in the journal" if state.keeps else "there was nothing to claim")
    if state.again is not None:
        return _repeated(state, state.again)
    if len(state.scored("baseline")) < state.rules["baselines"]:
        return _unchanged(state, "baseline")
    cause = _search_over(state, now)
    if cause:
        claims, failed = len(state.scored("claim")), _failed_claims(state)
        if state.keeps and claims < 2 * state.night["claim_n"] and failed <= MAX_REPEATS:
            return _claim(state, claims)
        return Task("end", why=cause)
    if len(state.of("candidate")) // state.rules["sentinel_every"] > len(state.of("sentinel")):
        return _unchanged(state, "sentinel")
    top = state.incumbent
    return Task("candidate", state.number, 1, _seed(state), top.number, top.blob, length=top.length)


def _seed(state: State) -> int:
    """Of the next run: fresh, and the same however often that run is tried."""
    return int.from_bytes(hashlib.sha256(f"{state.night['seed']}:{state.number}".encode()).digest()[:4]) >> 1


def _resumed(row: Row) -> Task:
    splits = ("val", "test") if row.kind == "claim" else ("val",)
    return Task(row.kind, row.number, row.attempt + 1, row.seed, row.parent, row.blob, row.arm, splits, row.length)


def _repeated(state: State, row: Row) -> Task:
    splits = ("val", "test") if row.kind == "claim" else ("val",)
    return Task(row.kind, state.number, 1, _seed(state), row.parent, row.blob, row.arm, splits, row.length, True)


def _unchanged(state: State, kind: Kind) -> Task:
    top = state.incumbent
    length = top.length
    if kind == "baseline" and state.rules["objective"] == "time_to_target":
        length = LENGTHS[len(state.scored("baseline")) % len(LENGTHS)]
    return Task(kind, state.number, 1, _seed(state), top.number, top.blob, length=length)


def _claim(state: State, done: int) -> Task:
    """ABBA: the final incumbent, the night's first train.py twice, the final again, so that a drift cancels."""
    arm = "final" if done % 4 in (0, 3) else "first"
    who = state.incumbent if arm == "final" else state.stack[0]
    return Task("claim", state.number, 1, _seed(state), who.number, who.blob, arm, ("val", "test"), who.length)


def _failed_claims(state: State) -> int:
    return len(state.of("claim")) - len(state.scored("claim"))


def _search_over(state: State, now: float) -> str:
    """Why no further candidate is to be tried, or nothing."""
    limits = state.leg["limits"]
    tried = len(state.of("candidate"))
    if limits["max_experiments"] is not None and tried >= limits["max_experiments"]:
        return f"--max-experiments {limits['max_experiments']} are done"
    if limits["max_hours"] is not None:
        typical = fmean([r.total_s for r in state.rows if r.score is not None] or [0.0])  # a crash is soon over
        reserve = (1 + (2 * state.night["claim_n"] if state.keeps else 0)) * typical
        if now + reserve > state.leg["at"] + 3600 * limits["max_hours"]:
            return f"--max-hours {limits['max_hours']:g} are used"
    return state.exhausted or ("its search was over" if state.of("claim") else "")


def claim_runs(max_experiments: int | None, max_hours: float | None, run_s: float, fixed: int | None) -> int:
    """Runs an arm of the claim, fixed when the night begins; 0 for a night that is too short to claim."""
    if fixed is not None:
        return fixed if fixed > 1 else 0  # one run an arm has no interval
    hours = math.inf if max_hours is None else 3600 * max_hours / run_s
    runs = min(math.inf if max_experiments is None else max_experiments, hours)
    n = CLAIM_MAX if math.isinf(runs) else round(CLAIM_SHARE * runs)
    return 0 if n < CLAIM_MIN else min(n, CLAIM_MAX)


# What a score means


@dataclass(frozen=True)
class Draw:
    """One run's figures on the steering split."""

    length: float
    train_s: float
    loss: float
    bpb: float


def _draw(row: Row) -> Draw:
    val = row.scores["val"]
    return Draw(row.length, row.train_s, val.loss, val.bpb)


def variance(state: State, draw: Draw | None = None) -> float:
    """σ², from the profile's σ₀ as a prior and from repeats of one train.py: (4 σ₀² + SS) / (4 + df).

    `draw`: a baseline that is not in the ledger yet.
    """
    ss, df = scatter(state, "baseline", "sentinel", draw=draw)
    prior = state.night["prior"]
    return float((PRIOR_DF * state.night["sigma0"] ** 2 + prior["ss"] + ss) / (PRIOR_DF + prior["df"] + df))


def scatter(state: State, *kinds: Kind, draw: Draw | None = None) -> tuple[float, int]:
    """Sum of squares and degrees of freedom of a night's repeats: runs of the same blob, each group about its mean.

    A candidate's own draw is no repeat of it: it was kept for being good.
    """
    new = [] if draw is None else [draw]
    price = price_of_loss(state, [*_baselines(state), *new])
    groups: dict[str, list[float]] = defaultdict(list)
    for row in state.scored(*kinds):
        groups[row.blob].append(steering(state, _draw(row), price))
    groups[state.night["blob"]] += [steering(state, d, price) for d in new]
    squares = [(y - fmean(draws)) ** 2 for draws in groups.values() for y in draws]
    fitted = sum(1 for draws in groups.values() if draws) + (price is not None)  # means, and the slope
    return sum(squares), len(squares) - fitted


def _baselines(state: State) -> list[Draw]:
    return [_draw(row) for row in state.scored("baseline")]


def price_of_loss(state: State, baselines: Sequence[Draw]) -> float | None:
    """κ, seconds a nat, of a time_to_target night: t₀/ε with ε = −dL/d ln t by regression over the baselines.

    None before three baselines of two lengths are there, and in a val_bpb night, which has no use for it.
    """
    if state.rules["objective"] != "time_to_target" or len(baselines) < 3 or len({d.length for d in baselines}) < 2:
        return None
    log_t = [math.log(d.train_s) for d in baselines]
    if max(log_t) - min(log_t) < (math.log(max(LENGTHS) / min(LENGTHS))) / 2:
        raise Stop(
            "time_to_target: runs of other lengths took as long, so seconds cannot be weighed against loss. train.py "
            "must end by itself, by prepare.open_run(total_steps=...): set TOTAL_STEPS, commit, begin a new night"
        )
    mean_t, mean_loss = fmean(log_t), fmean(d.loss for d in baselines)
    covariance = sum((t - mean_t) * (d.loss - mean_loss) for t, d in zip(log_t, baselines, strict=True))
    elasticity = -covariance / sum((t - mean_t) ** 2 for t in log_t)
    elasticity = max(elasticity, 1e-3)  # longer runs that are no better tell nothing: then loss is very dear
    return fmean(d.train_s for d in baselines) / elasticity


def steering(state: State, draw: Draw, price: float | None) -> float:
    """The score that steers: bits per byte, or the seconds that the target itself would have taken."""
    if state.rules["objective"] == "val_bpb":
        return draw.bpb
    return draw.train_s + (price or 0.0) * (draw.loss - state.rules["target_loss"])


def judge(state: State, task: Task, run: Run, score: Score, net_added: int) -> Decision:
    """What a scored run means for the incumbent and for what is believed of it."""
    val = score.splits["val"]
    draw = Draw(task.length, run.train_s, val.loss, val.bpb)
    price = price_of_loss(state, _baselines(state))
    y = steering(state, draw, price)
    again = _repeat(state, task, run, val.loss, price)
    if again:
        belief, age = _later(state)
        return Decision("discard", y, belief=belief, age=age, length=again[0], reason=again[1])
    if task.kind == "baseline":
        return Decision("keep", y, belief=_first_belief(state, draw))
    sigma2 = variance(state)
    known = state.incumbent.belief
    assert known is not None
    if task.kind == "claim":
        return Decision("keep", y, delta=y - known.m, belief=known)
    belief = Belief(known.m, known.s2 + DRIFT * sigma2)
    if task.kind == "sentinel":
        return _sentinel(state, y, belief, sigma2)
    before = state.rows[-1] if state.rows and state.rows[-1].reason.startswith(QUARANTINED) else None
    if before is not None and before.blob == task.blob and before.score is not None:
        return _candidate(y, belief, sigma2, net_added, max(sigma2, (belief.m - before.score) ** 2))
    if belief.m - y > (far := QUARANTINE * math.sqrt(sigma2 + belief.s2)):
        reason = f"{QUARANTINED}a gain of more than {far:.4g}, so it is measured again under another seed"
        return Decision("discard", y, y - belief.m, None, belief, DRIFT * sigma2, length=task.length, reason=reason)
    return _candidate(y, belief, sigma2, net_added, sigma2)


def reject(state: State, reason: Reject) -> Decision:
    """A run that has no score. The incumbent stays; the machine's clock went on all the same."""
    belief, age = _later(state)
    return Decision(reason.status, belief=belief, age=age, reason=str(reason))


def _later(state: State) -> tuple[Belief | None, float]:
    """The belief about the incumbent after a run that says nothing of it, and what the run's turn adds to variances."""
    known = state.incumbent.belief
    if known is None:
        return None, 0.0
    age = DRIFT * variance(state)
    return Belief(known.m, known.s2 + age), age


def _repeat(state: State, task: Task, run: Run, loss: float, price: float | None) -> tuple[float, str] | None:
    """The length at which this run is to be made again, and why; judged without a look at its score.

    (But for a time_to_target run far from the target, where seconds cannot be corrected by the loss.)
    """
    repeats = 0
    for row in reversed(state.rows):
        if row.counts or row.blob != task.blob and task.kind != "candidate":
            break
        repeats += 1
    if repeats >= MAX_REPEATS:
        return None
    if run.unhealthy:
        return task.length, f"{REPEATED}{run.unhealthy}"
    miss = loss - state.rules["target_loss"]
    if price is None or task.kind in ("baseline", "claim") or abs(miss) <= LOSS_BAND:
        return None
    elasticity = fmean([r.train_s for r in state.scored("baseline")]) / price
    reason = f"{REPEATED}loss {loss:.4f} is off the target; length re-aimed"
    return task.length * math.exp(max(-REAIM, min(REAIM, miss / elasticity))), reason


def _first_belief(state: State, draw: Draw) -> Belief:
    draws = [*_baselines(state), draw]
    price = price_of_loss(state, draws)
    return Belief(fmean(steering(state, d, price) for d in draws), variance(state, draw) / len(draws))


def threshold(net_added: int) -> float:
    """What a keep must gain, in σ: simpler is better, and lines cost."""
    return 0.0 if net_added < 0 else min(COST + COST_PER_LINE * net_added, COST_CAP)


def _candidate(y: float, belief: Belief, sigma2: float, net_added: int, tau2: float) -> Decision:
    """Keeps a candidate whose gain, shrunk towards nothing, is worth its lines. The prior of a gain is N(0, τ²).

    τ is σ; of a gain measured again it is what was measured first, which tells how large such a thing can be.
    """
    noise2 = sigma2 + belief.s2
    gain = belief.m - y
    shrunk = gain * tau2 / (tau2 + noise2)
    p_better = NormalDist().cdf(shrunk / math.sqrt(tau2 * noise2 / (tau2 + noise2)))
    age = DRIFT * sigma2
    if shrunk <= threshold(net_added) * math.sqrt(sigma2):
        return Decision("discard", y, -gain, p_better, belief, age)
    weight = (tau2 + belief.s2) / (tau2 + belief.s2 + sigma2)
    return Decision("keep", y, -gain, p_better, Belief(belief.m - weight * gain, weight * sigma2), age)


def _sentinel(state: State, y: float, belief: Belief, sigma2: float) -> Decision:
    """One Kalman step on the incumbent; a young keep that falls behind its parent is taken back."""
    spread2 = sigma2 + belief.s2
    bound = CLIP * math.sqrt(spread2)
    surprise = max(-bound, min(bound, y - belief.m))
    gain = belief.s2 / spread2
    moved = Belief(belief.m + gain * surprise, belief.s2 * (1 - gain))
    age = DRIFT * sigma2
    if len(state.stack) > 1 and state.incumbent.sentinels < CHECKS:
        parent = state.stack[-2].belief
        assert parent is not None
        if moved.m > parent.m:
            back = Belief(parent.m, parent.s2 + age)
            return Decision("keep", y, y - belief.m, None, back, age, takes_back=state.incumbent.number)
    return Decision("keep", y, y - belief.m, None, moved, age)


# What is claimed


@dataclass(frozen=True)
class Interval:
    """final − first on one split, pooled t, 95%; in the score's units, negative is better."""

    delta: float
    low: float
    high: float
    first: float
    final: float


def claim(state: State, why: str) -> dict[str, Any]:
    """What the night may say in the morning, as the claim event holds it."""
    n = state.night["claim_n"]
    rows = state.scored("claim")
    told: dict[str, Any] = {"why": why, "per_arm": n}
    if not state.keeps:
        return told | {"verdict": "no keep, no claim"}
    if n < 2:
        return told | {"verdict": f"too short to claim: fewer than {CLAIM_MIN} runs an arm"}
    if len(rows) < 2 * n:
        return told | {"verdict": f"no claim: {_failed_claims(state)} claim runs failed"}
    for split in ("test", "val"):
        interval = _compare([_measure(state, r, split) for r in rows if r.arm == "first"],
                            [_measure(state, r, split) for r in rows if r.arm == "final"])
        told[split] = interval.__dict__
    test = told["test"]
    better = test["high"] < 0
    if state.rules["objective"] == "time_to_target" and better:
        better = reaches([r.scores["val"].loss for r in rows if r.arm == "final"], state.rules["target_loss"])
    word: Literal["better", "worse", "no difference shown"]
    word = "better" if better else "worse" if test["low"] > 0 else "no difference shown"
    return told | {"verdict": word, "commit": state.incumbent.commit}


def _measure(state: State, row: Row, split: str) -> float:
    part = row.scores[split]
    price = price_of_loss(state, _baselines(state))
    return steering(state, Draw(row.length, row.train_s, part.loss, part.bpb), price)


def _compare(first: Sequence[float], final: Sequence[float]) -> Interval:
    n, df = len(first), len(first) + len(final) - 2
    a, b = fmean(first), fmean(final)
    ss = sum((y - a) ** 2 for y in first) + sum((y - b) ** 2 for y in final)
    half = t_quantile(0.975, df) * math.sqrt(ss / df * (1 / n + 1 / len(final)))
    return Interval(b - a, b - a - half, b - a + half, a, b)


def reaches(losses: Sequence[float], target: float) -> bool:
    """Whether the mean loss is at or under the target, by a one-sided t-test at p < 0.01."""
    n, mean = len(losses), fmean(losses)
    error = math.sqrt(sum((y - mean) ** 2 for y in losses) / (n - 1) / n)
    return mean + t_quantile(0.99, n - 1) * error <= target


def t_cdf(t: float, df: int) -> float:
    """Student's distribution function, in closed form for whole df: Abramowitz & Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(df))
    cos2 = math.cos(theta) ** 2
    term, total = 1.0, 0.0
    odd = df % 2
    for k in range(1 + odd, df, 2):
        total += term
        term *= cos2 * k / (k + 1)
    if odd:
        inner = theta + (math.sin(theta) * math.cos(theta) * total if df > 1 else 0.0)
        return 0.5 + inner / math.pi
    return 0.5 + math.sin(theta) * total / 2


def t_quantile(p: float, df: int) -> float:
    """The t with t_cdf(t, df) = p, by bisection; p in (0.5, 1)."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2
