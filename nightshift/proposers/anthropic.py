"""Asks a Claude model for the next experiment, through the Messages API with one tool.

An edit that does not fit is told back to the model with what nearly matched; an outage is waited out for hours; every
call reserves its worst-case price before it is made. What the model writes ends up in a train.py, in a title and in a
hypothesis, and nowhere else.
"""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from nightshift import brief as briefs
from nightshift import lint
from nightshift.config import Config
from nightshift.proposers import Budget
from nightshift.proposers.edits import Miss, apply
from nightshift.proposers.patience import Patience, describe, unbilled
from nightshift.values import Brief, Proposal, Reject, Retry, Stop

if TYPE_CHECKING:
    from anthropic.types import Message

RATES = ("input", "output", "cache_write", "cache_read")
UNSEEN_TOKENS = 2000  # of a request: what the API adds for tool use and message framing, generously
CACHE = {"type": "ephemeral", "ttl": "1h"}  # the default 5 minutes would lapse while one experiment trains
FAULTS = {"mend": 3, "shorten": 2, "nudge": 1}  # how often each is told back before the proposal is given up
NIGHT_GOES_ON = "The night goes on; propose an experiment with the tool propose_experiment."
TOOL: dict[str, Any] = {
    "name": "propose_experiment",
    "description": "Proposes the next experiment as exact search/replace edits of train.py. All edits apply, or none.",
    "input_schema": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "description": "what changes, in one line of at most 80 characters"},
            "hypothesis": {"type": "string", "description": "why the score should improve, in one to three sentences"},
            "family": {"type": "string", "description": "kind of idea: optimizer, schedule, architecture, data, ..."},
            "expected_delta": {"type": "number", "description": "guessed change of the score; negative is better"},
            "edits": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "search": {"type": "string", "description": "text that occurs exactly once in train.py"},
                        "replace": {"type": "string", "description": "what takes its place"},
                    },
                    "required": ["search", "replace"],
                },
            },
        },
        "required": ["title", "hypothesis", "family", "expected_delta", "edits"],
    },
}


@dataclass
class Fault:
    """Why an answer is no proposal yet, in words for the model."""

    kind: Literal["mend", "shorten", "nudge"]
    text: str


@dataclass
class Talk:
    """One conversation: the prompt, then answers and what was said to them.

    Answers go back unchanged, since thinking blocks are only valid as they came. One that cannot go back (cut off,
    refused) is dropped instead, and a note behind the prompt says what was wrong with it.
    """

    prompt: list[dict[str, Any]]
    turns: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    usd: float = 0.0
    output_tokens: int = 0

    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.prompt}, *self.turns]

    def restart(self, note: str) -> None:
        self.prompt = [*self.prompt, {"type": "text", "text": note}]
        self.turns = []

    def reply(self, answer: Message, text: str) -> None:
        """Sends the answer back with `text`, as an error of its tool call where it made one."""
        content = [b.model_dump(mode="json", exclude_unset=True, exclude={"parsed_output"}) for b in answer.content]
        results: list[dict[str, Any]] = [
            {"type": "tool_result", "tool_use_id": b.id, "is_error": True, "content": text}
            for b in answer.content if b.type == "tool_use"
        ]
        self.turns += [{"role": "assistant", "content": content},
                       {"role": "user", "content": results or [{"type": "text", "text": text}]}]


class Anthropic:
    """One proposal a conversation. `halt`, once set, ends a wait or a running answer with Retry."""

    name = "anthropic"
    ahead = True

    def __init__(
        self,
        config: Config,
        budget: Budget,
        say: Callable[[str], None],
        halt: threading.Event,
        patience_s: float = 6 * 3600.0,
        first_wait_s: float = 2.0,
    ) -> None:
        """Raises Stop with code 2 without credentials, or where money is limited and the model has no price."""
        import anthropic

        self.model, self.max_output_tokens = config.model, config.max_output_tokens
        self.rates = _rates(config, say)
        self.budget, self.say, self.halt = budget, say, halt
        self.patience_s, self.first_wait_s = patience_s, first_wait_s
        keyless, reason = True, "no environment variable holds one"
        try:
            self.client = anthropic.Anthropic(max_retries=0, timeout=anthropic.Timeout(300.0, connect=20.0))
            keyless = not (self.client.api_key or self.client.auth_token or self.client.credentials)
        except anthropic.CredentialsError as error:
            reason = str(error)
        if keyless:
            raise Stop(f"no key for the Anthropic API ({reason}): set ANTHROPIC_API_KEY, or use "
                       "`python loop.py --proposer knobs`, which needs none", 2)

    def propose(self, brief: Brief) -> Proposal | None:
        """The next experiment; None where --max-usd leaves no room for another worst-case call.

        Raises Reject("invalid") when the model gives no usable proposal, Stop when the API will not serve this key,
        model or account, or has been out for longer than `patience_s`; Retry when `halt` was set.
        """
        talk, left = self._open(brief), dict(FAULTS)
        while True:
            answer = self._ask(talk)
            if answer is None:
                return None
            outcome = _weigh(answer, brief)
            if isinstance(outcome, Proposal):
                return replace(outcome, tokens=talk.tokens, usd=talk.usd)
            left[outcome.kind] -= 1
            if left[outcome.kind] < 0:
                raise Reject("invalid", f"{self.model} gave no usable proposal; the last fault: {outcome.text}")
            if outcome.kind == "shorten" or answer.stop_reason == "refusal" or not answer.content:
                talk.restart(outcome.text)
            else:
                talk.reply(answer, outcome.text)

    def _open(self, brief: Brief) -> Talk:
        """The prompt in blocks, with cache marks behind the two parts that outlive a run."""
        blocks: list[dict[str, Any]] = [{"type": "text", "text": part} for part in briefs.parts(brief)]
        for block in blocks[:-1]:
            block["cache_control"] = CACHE
        return Talk(blocks)

    def _ask(self, talk: Talk) -> Message | None:
        """One answer, after as many tries as it takes; None where the money does not suffice for another."""
        request = {"model": self.model, "max_tokens": self.max_output_tokens, "system": briefs.SYSTEM, "tools": [TOOL],
                   "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "messages": talk.messages()}
        worst = self._worst(request, talk.output_tokens)
        patience = Patience(self.patience_s, self.first_wait_s, self.halt, self.say)
        while True:
            call = self.budget.reserve(worst)
            if call is None:
                self.say(f"anthropic: another call could cost ${worst:.2f}, more than --max-usd leaves")
                return None
            answer = self._try(request)
            if not isinstance(answer, Exception):
                self._settle(call, answer, talk)
                return answer
            if unbilled(answer):
                self.budget.settle(call, 0.0, {"model": self.model, "error": describe(answer)})
            patience.wait(answer)

    def _try(self, request: dict[str, Any]) -> Message | Exception:
        """The answer, or the API's or the network's error. Raises Retry once `halt` is set, the call left to itself.

        The call has a thread of its own: a model thinks for minutes without a word, and Ctrl-C must not wait for it.
        """
        import anthropic
        import httpx2

        outcome: list[Message | Exception] = []

        def call() -> None:
            try:
                outcome.append(self._stream(request))
            except (anthropic.APIError, anthropic.CredentialsError, httpx2.TransportError, ConnectionError) as error:
                outcome.append(error)

        thread = threading.Thread(target=call, daemon=True, name="anthropic call")
        thread.start()
        while thread.is_alive():
            if self.halt.is_set():
                raise Retry("anthropic: interrupted while the model was answering", 0.0)
            thread.join(0.1)
        if not outcome:
            raise RuntimeError("the call to the Anthropic API died of a fault in nightshift; its traceback is above")
        return outcome[0]

    def _stream(self, request: dict[str, Any]) -> Message:
        """The whole answer. Raises ConnectionError for one that breaks off: a part of it is worth nothing."""
        whole = False
        with self.client.messages.stream(**request) as stream:
            try:
                for event in stream:
                    whole = event.type == "message_stop"
            except ValueError as error:  # the SDK's word for a tool input that is no JSON
                raise ConnectionError(f"unreadable answer: {error}") from None
            if not whole:
                raise ConnectionError("the connection closed in the middle of an answer")
            return stream.get_final_message()

    def _worst(self, request: dict[str, Any], earlier: int) -> float:
        """Dollars that a request can cost at most.

        A token of input is at least one byte of the request; `earlier` output tokens stand in for thinking that is
        sent back in a form shorter than it is billed.
        """
        tokens = len(json.dumps(request, ensure_ascii=False).encode()) + earlier + UNSEEN_TOKENS
        dearest = max(self.rates["input"], self.rates["cache_write"], self.rates["cache_read"])
        return (tokens * dearest + self.max_output_tokens * self.rates["output"]) / 1e6

    def _settle(self, call: str, answer: Message, talk: Talk) -> None:
        """Books what an answer cost, by its own account of tokens."""
        usage = answer.usage
        counts = {
            "input": usage.input_tokens,
            "output": usage.output_tokens,
            "cache_write": usage.cache_creation_input_tokens or 0,
            "cache_read": usage.cache_read_input_tokens or 0,
        }
        usd = sum(counts[kind] * self.rates[kind] for kind in RATES) / 1e6
        self.budget.settle(call, usd, {"model": self.model, "stop_reason": answer.stop_reason, **counts})
        talk.tokens += sum(counts.values())
        talk.output_tokens += counts["output"]
        talk.usd += usd


def _rates(config: Config, say: Callable[[str], None]) -> dict[str, float]:
    """Dollars a million tokens by kind; zeros, said aloud, where no price is known and no limit is set."""
    rates = config.prices.get(config.model, {})
    missing = [kind for kind in RATES if kind not in rates]
    if not missing:
        return rates
    line = f"prices: {{{config.model}: {{input: .., output: .., cache_write: .., cache_read: ..}}}}"
    if rates or config.max_usd is not None:
        raise Stop(f"config.yaml: no {', '.join(missing)} price for {config.model}, and without one no cost can be "
                   f"bounded; add `{line}` in dollars a million tokens, or leave out --max-usd", 2)
    say(f"anthropic: config.yaml has no prices for {config.model}; what this night costs is counted as 0")
    return dict.fromkeys(RATES, 0.0)


def _weigh(answer: Message, brief: Brief) -> Proposal | Fault:
    """A proposal that may run, or the first thing that is wrong with the answer."""
    if answer.stop_reason in ("max_tokens", "model_context_window_exceeded"):
        return Fault("shorten", "Your last answer was cut off at the limit of its length and is lost. Think less and "
                     "propose a smaller change, with short edits.")
    if answer.stop_reason == "refusal":
        category = getattr(answer.stop_details, "category", None)
        return Fault("nudge", f"Your last answer was withheld{f' ({category})' if category else ''}. {NIGHT_GOES_ON}")
    calls = [block for block in answer.content if block.type == "tool_use"]
    if not calls:
        return Fault("nudge", NIGHT_GOES_ON)
    if calls[0].name != TOOL["name"]:
        return Fault("mend", f"There is no tool {calls[0].name!r}. {NIGHT_GOES_ON}")
    return _read(calls[0].input, brief)


def _read(given: Any, brief: Brief) -> Proposal | Fault:
    """The tool's input as a Proposal; the schema binds nobody, so every field is looked at."""
    given = given if isinstance(given, dict) else {}
    title, edits = _line(given.get("title"), 120), given.get("edits")
    if not title or not isinstance(edits, list) or not edits:
        return Fault("mend", "The input needs a title and a list of edits, each {search, replace}.")
    fields = [(e.get("search"), e.get("replace")) if isinstance(e, dict) else (None, None) for e in edits]
    pairs = [(s, r) for s, r in fields if isinstance(s, str) and isinstance(r, str)]
    if len(pairs) < len(edits):
        return Fault("mend", "Every edit is an object of two strings, search and replace.")
    train_py = apply(brief.train_py, pairs)
    if isinstance(train_py, Miss):
        return Fault("mend", f"Nothing was applied. {train_py.reason}")
    try:
        train_py.encode()
        ast.parse(train_py)
    except (SyntaxError, ValueError, RecursionError) as error:
        return Fault("mend", f"Nothing was applied: train.py would no longer parse as Python: {error}")
    reasons = lint.check(train_py)
    same = next((past for past in brief.history if past.blob == lint.blob(train_py)), None)
    if train_py == brief.train_py:
        reasons = ["the edits leave train.py as it is"]
    elif same is not None:
        reasons = [f"this is the very train.py of run {same.number}, which ended as {same.status}"]
    if reasons:
        return Fault("mend", "Nothing was applied: " + "; ".join(reasons))
    expected = given.get("expected_delta")
    known = isinstance(expected, int | float) and not isinstance(expected, bool)
    return Proposal(title, _line(given.get("hypothesis"), 2000), train_py, Anthropic.name,
                    _line(given.get("family"), 40), float(expected) if known else None)


def _line(text: Any, limit: int) -> str:
    """Model text as one printable line."""
    words = text.split() if isinstance(text, str) else []
    return "".join(c for c in " ".join(words) if c.isprintable())[:limit].strip()
