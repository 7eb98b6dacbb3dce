"""Who thinks of the next experiment: one file each, one method, chosen by config.proposer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from nightshift.config import ROOT, Config
from nightshift.values import Brief, Proposal, Stop


class Proposer(Protocol):
    """`ahead`: whether to draw up the next proposal while one still trains."""

    name: str
    ahead: bool

    def propose(self, brief: Brief) -> Proposal | None:
        """The next experiment; None when there is nothing more to propose. Raises Retry, Reject or Stop."""


class Budget(Protocol):
    """The night's money. A reservation that is never settled counts as spent."""

    def reserve(self, usd: float, /) -> str | None:
        """Journals that a call may cost `usd`; the call's id, or None if that could pass --max-usd."""

    def settle(self, call: str, usd: float, detail: dict[str, Any], /) -> None:
        """Journals what the call really cost."""


def make(
    config: Config,
    device_kind: str,
    budget: Budget,
    say: Callable[[str], None] = print,
    halt: threading.Event | None = None,
    root: Path = ROOT,
) -> Proposer:
    """The proposer that `config.proposer` names; `auto` is anthropic where a key is set, else knobs.

    `device_kind` is "cuda" or "cpu". `say` shows a line to the person while a proposer waits; setting `halt` ends
    such a wait. Raises Stop with code 2 where the name is unknown or the proposer cannot work as configured.
    """
    name = config.proposer
    if name == "auto":
        name = "anthropic" if os.environ.get("ANTHROPIC_API_KEY") else "knobs"
    if name == "anthropic":
        from nightshift.proposers.anthropic import Anthropic

        return Anthropic(config, budget, say, halt or threading.Event())
    if name == "knobs":
        from nightshift.proposers.knobs import Knobs

        return Knobs(device_kind, root)
    if name.startswith("replay:") and name != "replay:":
        from nightshift.proposers.replay import Replay

        return Replay(Path(name.removeprefix("replay:")))
    raise Stop(f"no proposer {name!r}; --proposer takes auto, anthropic, knobs or replay:DIR", 2)
