"""The anthropic proposer against a server that speaks the Messages protocol on loopback."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages_server import THINKING, MessagesServer, Reply, edit, failure, says, tool_use

from nightshift import brief as briefs
from nightshift import lint
from nightshift.config import Config, load
from nightshift.proposers.anthropic import Anthropic
from nightshift.proposers.edits import Miss, apply
from nightshift.proposers.patience import retry_after
from nightshift.values import Brief, Past, Proposal, Reject, Retry, Stop, Task

TRAIN = """import torch

LR = 0.04
DEPTH = 4


def main():
    x = LR * DEPTH
    print(x)
    print(x)
"""


class Purse:
    """A budget in memory: what is reserved and not settled counts as spent."""

    def __init__(self, limit: float = 1e9) -> None:
        self.limit, self.calls, self.details = limit, dict[str, float](), list[dict[str, Any]]()
        self.peak = 0.0

    @property
    def spent(self) -> float:
        return sum(self.calls.values())

    def reserve(self, usd: float) -> str | None:
        if self.spent + usd > self.limit:
            return None
        self.calls[f"call {len(self.calls)}"] = usd
        self.peak = max(self.peak, self.spent)
        return f"call {len(self.calls) - 1}"

    def settle(self, call_id: str, usd: float, detail: dict[str, Any]) -> None:
        assert usd <= self.calls[call_id], "a call cost more than its worst case"
        self.calls[call_id] = usd
        self.details.append(detail)


def config(**flags: Any) -> Config:
    return load(proposer="anthropic", **flags)


def brief(history: tuple[Past, ...] = ()) -> Brief:
    return briefs.build(config(), Task("candidate", 4), "Make it better.", TRAIN, history)


class Night:
    """A proposer, its purse, and what it said; its waits are short."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch, limit: float = 1e9, patience_s: float = 60.0,
                 **flags: Any) -> None:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-test")
        self.purse, self.said, self.halt = Purse(limit), list[str](), threading.Event()
        self.proposer = Anthropic(config(**flags), self.purse, self.said.append, self.halt, patience_s, 0.05)


def run(
    monkeypatch: pytest.MonkeyPatch, *script: Reply, **options: Any
) -> tuple[Proposal | None, MessagesServer, Night]:
    """One proposal against a server that answers with `script`, every line of which must be used."""
    with MessagesServer(*script) as server:
        night = Night(server.url, monkeypatch, **options)
        try:
            return night.proposer.propose(brief()), server, night
        finally:
            assert len(server.requests) == len(script), "not as many calls as the script has answers"


def test_a_good_edit_becomes_a_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = edit("LR = 0.04", "LR = 0.05", title="raise\nthe rate", expected_delta=-0.02)
    reply.usage = {"input_tokens": 100, "output_tokens": 300, "cache_creation_input_tokens": 2000,
                   "cache_read_input_tokens": 5000}
    proposal, server, night = run(monkeypatch, reply)
    assert proposal is not None
    assert proposal.train_py == TRAIN.replace("0.04", "0.05")
    assert (proposal.title, proposal.family, proposal.expected_delta) == ("raise the rate", "schedule", -0.02)
    assert proposal.tokens == 7400
    usd = (100 * 4 + 300 * 20 + 2000 * 8 + 5000 * 0.2) / 1e6
    assert proposal.usd == pytest.approx(usd) and night.purse.spent == pytest.approx(usd)
    request = server.requests[0]
    assert request["model"] == "claude-opus-5-5" and request["tool_choice"]["type"] == "auto"
    blocks = request["messages"][0]["content"]
    assert "".join(block["text"] for block in blocks) == brief().text
    assert [block.get("cache_control") for block in blocks] == [{"type": "ephemeral", "ttl": "1h"}] * 2 + [None]


def test_an_edit_that_does_not_match_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    proposal, server, night = run(
        monkeypatch, edit("LR = 0.4\nDEPTH  = 4", "LR = 1"), edit("LR = 0.04\nDEPTH = 4", "LR = 1\nDEPTH = 4"))
    assert proposal is not None and "LR = 1\n" in proposal.train_py
    assert proposal.usd == pytest.approx(night.purse.spent) and len(night.purse.calls) == 2
    answer, result = server.requests[1]["messages"][1:]
    assert answer["content"][0] == THINKING
    sent = answer["content"][1]
    assert set(sent) == {"type", "id", "name", "input"}
    assert sent["input"]["edits"][0]["search"] == "LR = 0.4\nDEPTH  = 4"
    told = result["content"][0]
    assert told["is_error"] and told["tool_use_id"] == sent["id"]
    assert "lines 3 to 4" in told["content"] and "LR = 0.04\nDEPTH = 4" in told["content"]


@pytest.mark.parametrize(("reply", "hint"), [
    (edit("    print(x)\n", ""), "more than once in train.py, on lines 9, 10"),
    (edit("import torch\n", "import torch\n\ntorch.manual_seed(1)\n"), "sets a seed of its own"),
    (edit("LR = 0.04", "LR = = 1"), "no longer parse"),
    (edit("LR = 0.04", "LR = 0.04"), "leave train.py as it is"),
    (tool_use(edits=[{"search": "LR", "replace": 1}]), "two strings"),
    (tool_use(edits=[]), "a list of edits"),
    (tool_use(edits="all"), "a list of edits"),
    (tool_use(title=["?"], edits=[{"search": "DEPTH = 4", "replace": ""}]), "a title"),
    (tool_use(edits=[{"search": "LR = 0.04\nD", "replace": "D"}, {"search": "DEPTH = 4", "replace": ""}]), "overlap"),
])
def test_a_faulty_proposal_is_told_back(monkeypatch: pytest.MonkeyPatch, reply: Reply, hint: str) -> None:
    proposal, server, _ = run(monkeypatch, reply, edit("DEPTH = 4", "DEPTH = 5", expected_delta="low"))
    assert proposal is not None and "DEPTH = 5" in proposal.train_py and proposal.expected_delta is None
    assert hint in server.requests[1]["messages"][2]["content"][0]["content"]


def test_a_repeat_of_an_earlier_run_is_told_back(monkeypatch: pytest.MonkeyPatch) -> None:
    past = Past(2, "candidate", "discard", "deeper", "", "anthropic", lint.blob(TRAIN.replace("= 4", "= 5")), 1.0, 0.1)
    with MessagesServer(edit("DEPTH = 4", "DEPTH = 5"), edit("DEPTH = 4", "DEPTH = 6")) as server:
        proposal = Night(server.url, monkeypatch).proposer.propose(brief((past,)))
    assert proposal is not None and "DEPTH = 6" in proposal.train_py
    assert "very train.py of run 2" in server.requests[1]["messages"][2]["content"][0]["content"]


def test_three_mends_are_not_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Reject, match="no usable proposal") as caught:
        run(monkeypatch, *[edit("nothing like it", "")] * 4)
    assert caught.value.status == "invalid"


def test_a_truncated_answer_is_asked_again_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = replace(edit("LR = 0.04", "LR = 0.05"), stop_reason="max_tokens")
    proposal, server, _ = run(monkeypatch, cut, edit("LR = 0.04", "LR = 0.06"))
    assert proposal is not None and "0.06" in proposal.train_py
    (turn,) = server.requests[1]["messages"]
    assert "cut off" in turn["content"][-1]["text"]
    assert turn["content"][:-1] == server.requests[0]["messages"][0]["content"]


@pytest.mark.parametrize("text", ["We have converged; I suggest to stop the night here.", "Shall I go on with the LR?"])
def test_a_reply_that_tries_to_end_the_night(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    proposal, server, _ = run(monkeypatch, says(text), edit("LR = 0.04", "LR = 0.06"))
    assert proposal is not None
    answer, nudge = server.requests[1]["messages"][1:]
    assert answer["content"] == [{"type": "text", "text": text}]
    assert nudge["content"][0]["text"].startswith("The night goes on")
    with pytest.raises(Reject, match="The night goes on"):
        run(monkeypatch, says(text), says(text))


def test_a_refusal_is_asked_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Reply([], "refusal", stop_details={"type": "refusal", "category": "frontier_llm", "explanation": None})
    proposal, server, _ = run(monkeypatch, refusal, edit("LR = 0.04", "LR = 0.06"))
    assert proposal is not None and len(server.requests[1]["messages"]) == 1
    with pytest.raises(Reject, match="frontier_llm"):
        run(monkeypatch, refusal, refusal)


@pytest.mark.parametrize("headers", [{"retry_after": "1"}, {"retry_after_ms": "1000", "retry_after": "60"}])
def test_retry_after_is_obeyed(monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]) -> None:
    limited = failure(429, "rate_limit_error", "slow down", **headers)
    proposal, server, night = run(monkeypatch, limited, edit("LR = 0.04", "LR = 0.05"))
    assert proposal is not None
    assert 1.0 <= server.times[1] - server.times[0] < 2.0
    assert night.purse.details[0]["error"] == "429 rate_limit_error: slow down"
    assert list(night.purse.calls.values()) == [0.0, pytest.approx(proposal.usd)]
    assert len(night.said) == 1 and "429" in night.said[0] and "next try in 1 s" in night.said[0]


@pytest.mark.parametrize("outage", [
    failure(529, "overloaded_error", "Overloaded"),
    failure(500, "api_error", "Internal server error"),
    Reply(error={"type": "overloaded_error", "message": "Overloaded"}),
])
def test_an_outage_is_waited_out(monkeypatch: pytest.MonkeyPatch, outage: Reply) -> None:
    proposal, server, night = run(monkeypatch, outage, outage, edit("LR = 0.04", "LR = 0.05"))
    assert proposal is not None and len(night.said) == 2
    first, second = server.times[1] - server.times[0], server.times[2] - server.times[1]
    assert 0.025 <= first < 0.5 and 0.05 <= second < 0.5
    unsettled = len(night.purse.calls) - len(night.purse.details)
    assert unsettled == (2 if outage.status == 200 else 0), "an answer that began may have been billed"


@pytest.mark.parametrize("clean", [True, False])
def test_a_connection_that_drops_counts_as_spent(monkeypatch: pytest.MonkeyPatch, clean: bool) -> None:
    good = edit("LR = 0.04", "LR = 0.05")
    proposal, _, night = run(monkeypatch, replace(good, break_off=True, clean=clean), good)
    assert proposal is not None and len(night.purse.details) == 1
    lost, paid = night.purse.calls.values()
    assert lost > paid == proposal.usd


def test_nobody_listening_costs_nothing_and_ends_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    with MessagesServer() as server:
        url = server.url
    night = Night(url, monkeypatch, patience_s=0.4)
    with pytest.raises(Stop, match="has not answered .* goes on with this night"):
        night.proposer.propose(brief())
    assert len(night.purse.calls) >= 3 and night.purse.spent == 0


@pytest.mark.parametrize(("error", "words"), [
    (failure(400, "invalid_request_error", "Your credit balance is too low to access the API."), "may not spend more"),
    (failure(400, "invalid_request_error", "You have reached your specified API usage limits."), "may not spend more"),
    (failure(402, "billing_error", "Payment required"), "may not spend more"),
    (failure(429, "rate_limit_error", "Monthly limit", "enforced_spend_limit_reached"), "may not spend more"),
    (failure(401, "authentication_error", "invalid x-api-key"), "ANTHROPIC_API_KEY"),
    (failure(403, "permission_error", "not yours"), "forbids this key"),
    (failure(404, "not_found_error", "model: claude-opus-0"), "check model"),
])
def test_what_only_a_person_can_mend_stops_at_once(monkeypatch: pytest.MonkeyPatch, error: Reply, words: str) -> None:
    with pytest.raises(Stop, match=words) as caught:
        run(monkeypatch, error)
    assert "python loop.py run" in str(caught.value) and error.error is not None
    assert error.error["message"] in str(caught.value)


def test_halt_ends_a_wait_and_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(edit("LR = 0.04", "LR = 0.05"), delay_s=5)
    for reply in (failure(529, "overloaded_error", "Overloaded", retry_after="30"), slow):
        with MessagesServer(reply) as server:
            night = Night(server.url, monkeypatch)
            threading.Timer(0.3, night.halt.set).start()
            began = time.monotonic()
            with pytest.raises(Retry, match="interrupted"):
                night.proposer.propose(brief())
            assert 0.3 <= time.monotonic() - began < 2


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 3), st.lists(st.sampled_from(["good", "miss", "cut", "529", "drop"]), max_size=12))
def test_max_usd_is_never_passed(limit: float, script: list[str]) -> None:
    """Whatever the API does: reservations never pass the limit, and the proposer ends with None or a proposal."""
    replies = {
        "good": edit("LR = 0.04", "LR = 0.05"),
        "miss": edit("nothing", ""),
        "529": failure(529, "overloaded_error", ""),
        "cut": replace(says("..."), stop_reason="max_tokens"),
        "drop": replace(says("..."), break_off=True),
    }
    with MessagesServer(*(replies[name] for name in script), *[replies["good"]] * 20) as server, \
            pytest.MonkeyPatch.context() as patch:
        night = Night(server.url, patch, limit=limit)
        night.proposer.first_wait_s = 0.0
        outcome: Proposal | None = None
        try:
            outcome = night.proposer.propose(brief())
        except Reject:
            return
        finally:
            assert night.purse.peak <= limit
            assert len(night.purse.calls) == len(server.requests), "every request has a reservation of its own"
    assert (outcome is None) == ("--max-usd" in "".join(night.said))


def test_the_worst_case_covers_a_cached_write_and_a_full_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with MessagesServer() as server:
        night = Night(server.url, monkeypatch)
        size = len(json.dumps({"text": brief().text}).encode())
        worst = night.proposer._worst({"text": brief().text}, 0)
    assert worst >= (size * 8.0 + 32000 * 20.0) / 1e6


def test_without_a_price(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stop, match="prices: {some-model:") as caught:
        Night("http://127.0.0.1:9", monkeypatch, model="some-model", max_usd=5.0)
    assert caught.value.code == 2
    proposal, _, night = run(monkeypatch, edit("LR = 0.04", "LR = 0.05"), model="some-model")
    assert proposal is not None and proposal.usd == 0 and "counted as 0" in night.said[0]


def test_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path))
    with pytest.raises(Stop, match="ANTHROPIC_API_KEY"):
        Anthropic(config(), Purse(), print, threading.Event())


@settings(deadline=None)
@given(st.text("ab\n ", max_size=60), st.lists(st.tuples(st.text("ab\n ", max_size=6), st.text("xy", max_size=3))))
def test_edits_apply_in_full_or_not_at_all(text: str, edits: list[tuple[str, str]]) -> None:
    result = apply(text, edits)
    unique = all(s and sum(text.startswith(s, i) for i in range(len(text))) == 1 for s, _ in edits)
    if isinstance(result, Miss):
        assert not unique or "overlap" in result.reason
    else:
        assert unique
        assert len(result) == len(text) + sum(len(r) - len(s) for s, r in edits)
        assert all(result.count(c) == sum(r.count(c) for _, r in edits) for c in "xy")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_retry_after_survives_anything(value: str) -> None:
    seconds = retry_after({"retry-after": value, "retry-after-ms": value}, datetime.now(UTC))
    assert seconds is None or 0 <= seconds < float("inf")


def test_retry_after_as_a_date() -> None:
    now = datetime(2026, 11, 20, 3, 0, tzinfo=UTC)
    later = format_datetime(now + timedelta(minutes=20), usegmt=True)
    assert retry_after({"retry-after": later}, now) == 1200
    assert retry_after({"retry-after": format_datetime(now - timedelta(hours=1))}, now) == 0
