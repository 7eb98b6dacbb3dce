"""What one sees while a night runs."""

from __future__ import annotations

from nightshift.ledger import State, description
from nightshift.runner import Live
from nightshift.values import Candidate


class View:
    """Plain lines, for a log."""

    def say(self, text: str) -> None:
        """One line of news."""
        print(text, flush=True)

    def starts(self, candidate: Candidate, state: State) -> None:
        """A run begins."""
        self.say(f"run {candidate.task.number} ({candidate.task.kind}): {candidate.title}")

    def watch(self, live: Live) -> None:
        """A run goes on."""

    def ended(self, state: State) -> None:
        """A run is decided."""
        row = state.rows[-1]
        val = row.scores.get("val")
        figure = f"val_bpb {val.bpb:.4f}" if val else ""
        self.say(f"run {row.number}: {row.status} {figure} {row.total_s:.1f} s  {description(row)}")
