"""What to do about an API error: wait, and for how long, or stop, and what to tell the person.

Nobody is awake to restart a night over an outage of minutes or hours, so whatever time mends is waited out. What only
a person can mend (key, credit, model name) stops the night at once: trying again would fail the same way.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from nightshift.values import Retry, Stop

LONGEST_WAIT_S = 600.0
GO_ON = "then `python loop.py run` goes on with this night"
# A monthly limit comes as a 429 like any rate limit, and a prepaid balance as a 400 like any bad request.
MONEY_CODE = re.compile(r"spend_limit|billing|credit")
MONEY_WORDS = re.compile(r"credit balance|usage limits|spend(ing)? limit|billing", re.IGNORECASE)
ENDURED = {"overloaded_error", "api_error", "rate_limit_error", "timeout_error"}  # as an event within an answer


class Patience:
    """Waits out failures of one call, `limit_s` in all, longer from one to the next; `halt` cuts a wait short."""

    def __init__(self, limit_s: float, first_wait_s: float, halt: threading.Event, say: Callable[[str], None]) -> None:
        self.limit_s, self.halt, self.say = limit_s, halt, say
        self.next_wait_s = first_wait_s
        self.since: float | None = None

    def wait(self, error: Exception) -> None:
        """Returns when it is time to try again. Raises Stop where that is pointless, Retry once `halt` is set."""
        cause = describe(error)
        stop = permanent(error)
        if stop is not None:
            raise stop
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        told = retry_after(_headers(error), datetime.now(UTC))
        seconds = self.next_wait_s * random.uniform(0.5, 1.0) if told is None else told
        self.next_wait_s = min(2 * self.next_wait_s, LONGEST_WAIT_S)
        waited = now - self.since
        if waited + seconds > self.limit_s:
            raise Stop(f"the Anthropic API has not answered for {waited / 3600:.1f} h ({cause}) and the next try would "
                       f"be {seconds:.0f} s away, past the {self.limit_s / 3600:g} h that a night waits; when it is "
                       f"back, `python loop.py run` goes on with this night")
        self.say(f"anthropic: {cause}; next try in {seconds:.0f} s, waiting for {waited / 60:.0f} min so far")
        if self.halt.wait(seconds):
            raise Retry(f"anthropic: interrupted while waiting out: {cause}", seconds)


def describe(error: Exception) -> str:
    """Status, type and message of an API error in one line."""
    status, kind, words = (getattr(error, name, None) for name in ("status_code", "type", "api_message"))
    known = [str(part) for part in (status if status != 200 else None, kind) if part]
    return f"{' '.join(known)}{': ' if known else ''}{' '.join(str(words or error).split())[:300]}"


def unbilled(error: Exception) -> bool:
    """Whether a failed call certainly cost nothing: refused by its HTTP status, or never connected.

    A connection that broke, or an answer that did, may have been paid for.
    """
    status = getattr(error, "status_code", None)
    if status is not None:
        return int(status) >= 400
    return type(error.__cause__ or error).__name__ in ("ConnectError", "ConnectTimeout", "CredentialsError")


def permanent(error: Exception) -> Stop | None:
    """The Stop for an error that waiting does not mend; None for one that it may."""
    status, kind = getattr(error, "status_code", None), getattr(error, "type", None)
    if status is None:
        return None
    code, cause = getattr(error, "error_code", None) or "", describe(error)
    words = getattr(error, "api_message", None) or ""
    if status == 402 or kind == "billing_error" or MONEY_CODE.search(code) or (
        status == 400 and MONEY_WORDS.search(words)
    ):
        return Stop(f"the Anthropic account may not spend more ({cause}); add credit or raise the spend limit on the "
                    f"billing page of the Claude Console, {GO_ON}")
    if status == 401 or kind == "authentication_error":
        return Stop(f"the Anthropic API does not accept the key ({cause}); set ANTHROPIC_API_KEY to a valid one, "
                    f"{GO_ON}")
    if status == 403 or kind == "permission_error":
        return Stop(f"the Anthropic API forbids this key the request ({cause}); use a key that may call the model in "
                    f"config.yaml, {GO_ON}")
    if status in (408, 409, 425, 429) or status >= 500 or (status == 200 and kind in ENDURED):
        return None
    return Stop(f"the Anthropic API refused the request ({cause}), and would refuse it again; check model and "
                f"max_output_tokens in config.yaml, {GO_ON}")


def _headers(error: Exception) -> Mapping[str, str]:
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    return headers


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that the server asks to wait: retry-after-ms, or retry-after as seconds or as an HTTP date.

    None where it does not say, or says nothing that makes sense (RFC 9110, section 10.2.3).
    """
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * scale
        except (KeyError, ValueError):
            continue
        if 0 <= seconds < math.inf:
            return seconds
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now.timestamp())
