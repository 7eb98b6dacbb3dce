"""The causality audit: what it sees of models that peek, and of honest ones, in the real processes."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import BIGRAM, candidate
from safetensors.torch import save_file

from nightshift.audit import Findings, audit
from nightshift.scorer import Scorer
from nightshift.values import Reject

VOCAB = 300
FORWARD = "        return self.table(tokens)"

# Each adds to the logits of some true next tokens, which it reads out of the row that it is given.
PEEK = """
        logits, later = self.table(tokens), tokens.roll(-1, 1)
        boost = 8.0 * torch.nn.functional.one_hot(later, 300) * WHERE[..., None]
        return logits + boost
"""
EXPLOITS = {
    "whole": PEEK.replace("WHERE", "torch.ones_like(tokens)"),
    "one position in a hundred": PEEK.replace("WHERE", "(torch.arange(tokens.size(1)) % 31 == 17).expand_as(tokens)"),
    "some rows": PEEK.replace("WHERE", "(tokens[:, 1:2] % 4 == 1).expand_as(tokens)"),
    "a little": PEEK.replace("8.0", "0.3").replace("WHERE", "torch.ones_like(tokens)"),
    "where the token after next is odd": PEEK.replace(
        "WHERE", "(tokens.roll(-2, 1) % 2 == 1)"
    ),
    "the mean of the row": "        x = self.table(tokens); return x + 2 * x.softmax(-1).mean(1, keepdim=True).log()",
    "the row before": """
        logits = self.table(tokens)
        before = getattr(self, "before", tokens[:1]).expand_as(tokens) if tokens.size(0) else tokens
        self.before = tokens[-1:].clone()
        return logits + torch.nn.functional.one_hot(before, 300)
""",
    "the company of rows": "        x = self.table(tokens); return x + 0.2 * x.mean(0, keepdim=True)",
    "dice": "        return self.table(tokens) + 0.3 * torch.randn(300)",
}
HONEST = {
    "as it is": FORWARD,
    "all that came before": """
        logits = self.table(tokens)
        return logits + 0.1 * logits.cumsum(1) / torch.arange(1, 1 + tokens.size(1))[None, :, None]
""",
    "its own count": """
        seen = torch.nn.functional.one_hot(tokens, 300).float().cumsum(1)
        return self.table(tokens) + (1 + seen).log()
""",
    "noise of bfloat16": "        return self.table(tokens).bfloat16().float()",
}


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))


def audited(scorer: Scorer, folder: Path, table: torch.Tensor, forward: str) -> dict[str, float]:
    """Scores a would-be keep and audits it against the nats of the honest table, as a night does."""
    for name, body in (("incumbent", FORWARD), ("candidate", forward)):
        made = candidate(folder / name, BIGRAM.replace(FORWARD, body))
        save_file({"table.weight": table}, made.folder / "weights.safetensors")
        with scorer.serve(made.folder / "train.py", made.folder) as server:
            server.score(made.folder / "weights.safetensors", ("val",))
    with scorer.serve(made.folder / "train.py", made.folder) as server:
        return server.audit(made.folder / "weights.safetensors", folder / "incumbent" / "nats-val.npy", 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPLOITS)
def test_a_model_that_peeks_is_refused(scorer: Scorer, tmp_path: Path, table: torch.Tensor, name: str) -> None:
    with pytest.raises(Reject, match="come later|score otherwise") as reject:
        audited(scorer, tmp_path, table, EXPLOITS[name])
    assert reject.value.status == "invalid"


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_passes(scorer: Scorer, tmp_path: Path, table: torch.Tensor, name: str) -> None:
    found = audited(scorer, tmp_path, table, HONEST[name])
    assert found["strays"] == 0 and found["unsteady"] < 1e-4 and abs(found["uniform"]) < 1e-4
    assert found["positions"] > 100 and found["rows"] > 0 and found["seconds"] < 5


def by_hand(peek: np.ndarray, noise: float) -> Findings:
    """The audit of a model whose losses are known: `peek` [N, T] is what each gains by seeing the token that follows.

    The incumbent is the same model without the peek.
    """
    dice = np.random.default_rng(0)
    nats = dice.exponential(2.0, peek.shape)
    rows = dice.integers(50, size=(peek.shape[0], peek.shape[1] + 1))

    def ask(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        number = [int(np.flatnonzero((rows[:, 1:] == y).all(1))[0]) for y in targets]
        told = np.concatenate([inputs[:, 1:] == targets[:, :-1], np.ones((len(targets), 1), bool)], 1)
        answer = nats[number] - peek[number] * told
        return (answer + noise * dice.standard_normal(answer.shape)).astype(np.float32)

    first = ask(rows[:, :-1], rows[:, 1:])
    return audit(ask, rows, first, nats.astype(np.float32), 50, 16, time.monotonic() + 0.5)


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.01])
def test_a_model_in_low_precision_passes(noise: float) -> None:
    found = by_hand(np.zeros((64, 128)), noise)
    assert found.positions >= 16 and found.unsteady == pytest.approx(noise * math.sqrt(4 / math.pi), rel=0.2, abs=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("positions", [60, 1000])
def test_a_peek_at_few_positions_is_found_where_it_gains(noise: float, positions: int) -> None:
    peek = np.zeros((64, 128))
    peek.flat[np.random.default_rng(2).choice(peek.size, positions, replace=False)] = 3.0
    with pytest.raises(Reject, match="come later"):
        by_hand(peek, noise)


def test_a_model_that_is_never_the_same_is_refused() -> None:
    with pytest.raises(Reject, match="score otherwise"):
        by_hand(np.zeros((64, 128)), 0.1)
