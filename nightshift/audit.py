"""Does a would-be keep predict each token from those before it alone? A fresh model server is asked, in the scorer.

It gets rows again, in another order and in new company: first as they are, which shows how far one and the same model
differs from itself; then with random tokens behind some position, where nothing up to that position may change. Half of
the positions are drawn uniformly, and tell what peeking is worth on the whole; half are where the candidate gained most
over the incumbent, and tell of a peek at few of them. What is compared with is the first pass, which the scorer kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nightshift.values import Reject

Nats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Ask = Callable[[Tokens, Tokens], Nats]  # inputs, targets [n, T] -> nats of the targets [n, T]

POSITIONS = 8192  # at most
SAME = 1e-3  # nats that one token's loss may always move
UNSTEADY = 0.02  # nats that losses move on average, above which a model is no function of its tokens
SHARE = 0.1  # of the gain, that peeking may seem to be worth: more is no longer noise
STRAYS = 0.001  # of the positions, that may move further than the model does by itself: a router that flips


@dataclass
class Findings:
    """What the audit saw, in nats a token. Journaled with a keep."""

    rows: int  # asked again as they are
    positions: int  # asked with other tokens behind them
    unsteady: float  # mean difference of a loss from its first pass, as it is
    most: float  # the largest such difference
    uniform: float  # mean loss that random tokens behind cost, at uniform positions
    gained: float  # the same where the candidate gained most
    strays: int  # positions that moved further than STRAY_FACTOR times `most`
    seconds: float = 0.0


def audit(ask: Ask, rows: Tokens, first: Nats, incumbent: Nats | None, vocab: int, size: int, until: float) -> Findings:
    """Raises Reject("invalid") where the model peeks, or is not the same twice; takes until `until`, monotonic, or so.

    rows [N, T + 1], first and incumbent [N, T], the losses of the first pass; `size` rows are asked at a time.
    """
    began, dice = time.monotonic(), np.random.default_rng()  # of the system's entropy: nobody foresees it
    again = dice.permutation(len(rows))[: max(1, min(len(rows), POSITIONS // 8))]
    moved = _as_they_are(ask, rows, first, again, size, began + 0.3 * (until - began))
    gain = (incumbent if incumbent is not None else np.float32(first.mean())) - first
    uniform, gained, tried = _behind(ask, rows, first, gain, vocab, size, until, dice)
    limit = max(SAME, 4 * float(np.abs(moved).max()))
    found = Findings(
        rows=len(moved),
        positions=tried,
        unsteady=float(np.abs(moved).mean()),
        most=float(np.abs(moved).max()),
        uniform=float(uniform.mean()),
        gained=float(gained.mean()),
        strays=int((np.abs(np.concatenate([uniform, gained])) > limit).sum()),
        seconds=time.monotonic() - began,
    )
    _judge(found, uniform, max(0.0, float(gain.mean())) if incumbent is not None else 0.0)
    return found


def _judge(found: Findings, uniform: Nats, gain: float) -> None:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in asdict(found).items())
    if found.unsteady > UNSTEADY:
        raise Reject("invalid", f"the same rows in another order, in a new process, score otherwise ({numbers})")
    noise = float(uniform.std()) / math.sqrt(len(uniform))
    if found.uniform > SAME + 4 * noise + SHARE * gain:
        raise Reject("invalid", f"losses depend on tokens that come later, at any position ({numbers})")
    if found.strays > 2 + STRAYS * found.positions:
        raise Reject("invalid", f"losses depend on tokens that come later, at some positions ({numbers})")


def _as_they_are(ask: Ask, rows: Tokens, first: Nats, numbers: npt.NDArray[Any], size: int, until: float) -> Nats:
    """Differences from the first pass, [n, T]."""
    moved: list[Nats] = []
    for start in range(0, len(numbers), size):
        chosen = numbers[start : start + size]
        moved.append(ask(rows[chosen, :-1], rows[chosen, 1:]) - first[chosen])
        if time.monotonic() > until:
            break
    return np.concatenate(moved)


def _behind(
    ask: Ask, rows: Tokens, first: Nats, gain: Nats, vocab: int, size: int, until: float, dice: np.random.Generator
) -> tuple[Nats, Nats, int]:
    """What the loss at a position costs more where the tokens behind it are random: at uniform ones, and where gained.

    A row asked with its tokens random behind t shows t, and also what lies up to 8 before: a peek may reach further.
    """
    length = first.shape[1]
    most = np.argsort(gain, axis=None)[::-1][:POSITIONS]
    uniform: list[Nats] = []
    gained: list[Nats] = []
    taken = 0
    while taken < POSITIONS and (taken == 0 or time.monotonic() < until):
        half = max(1, size // 2)
        places = np.concatenate([dice.integers(first.size, size=half), most[(taken // 2) % len(most) :][: size - half]])
        row, at = places // length, places % length
        inputs = rows[row, :-1].copy()
        behind = np.arange(length)[None, :] > at[:, None]
        inputs[behind] = dice.integers(vocab, size=int(behind.sum()))
        moved = ask(inputs, rows[row, 1:]) - first[row]
        near = np.maximum(at[:, None] - np.arange(8)[None, :], 0)
        worst = np.take_along_axis(moved, near, axis=1)
        peak = np.take_along_axis(worst, np.abs(worst).argmax(1)[:, None], axis=1)[:, 0]
        uniform.append(moved[np.arange(half), at[:half]])
        gained.append(peak[half:])
        taken += len(places)
    return np.concatenate(uniform), np.concatenate(gained), taken
