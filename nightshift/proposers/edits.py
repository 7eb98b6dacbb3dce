"""Search/replace edits as a model writes them: all applied or none, and a miss answered with what nearly matched."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Miss:
    """Why edits do not apply, in words that let their author mend them."""

    reason: str


def apply(text: str, edits: Sequence[tuple[str, str]]) -> str | Miss:
    """`text` with every (search, replace) applied. Each search occurs exactly once in `text` as it was before any."""
    spans: list[tuple[int, int, str, int]] = []
    for number, (search, replacement) in enumerate(edits, 1):
        at = text.find(search) if search else -1
        if at < 0:
            return Miss(f"The search text of edit {number} does not occur in train.py. {nearest(text, search)}")
        if text.find(search, at + 1) >= 0:
            return Miss(f"The search text of edit {number} occurs more than once in train.py, on lines "
                        f"{', '.join(map(str, _line_numbers(text, search)))}. Add lines around it until it is unique.")
        spans.append((at, at + len(search), replacement, number))
    spans.sort()
    for (_, end, _, number), (start, _, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            return Miss(f"Edits {min(number, other)} and {max(number, other)} overlap; make them one.")
    for start, end, replacement, _ in reversed(spans):
        text = text[:start] + replacement + text[end:]
    return text


def _line_numbers(text: str, search: str, most: int = 8) -> list[int]:
    numbers: list[int] = []
    at = text.find(search)
    while at >= 0 and len(numbers) < most:
        numbers.append(text.count("\n", 0, at) + 1)
        at = text.find(search, at + 1)
    return numbers


def nearest(text: str, search: str) -> str:
    """A sentence that quotes the lines of `text` most like `search`, or says that there are none."""
    lines, wanted = text.split("\n"), search.strip("\n").split("\n")
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2("\n".join(wanted))
    best, at = 0.4, -1
    for start in range(max(1, len(lines) - len(wanted) + 1)):
        matcher.set_seq1("\n".join(lines[start:start + len(wanted)]))
        if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best and (ratio := matcher.ratio()) > best:
            best, at = ratio, start
    if at < 0:
        return "Nothing in it is similar; copy the text from train.py as it was shown."
    found = "\n".join(lines[at:at + len(wanted)])
    return f"Nearest are lines {at + 1} to {at + len(wanted)}; copy them exactly:\n<lines>\n{found}\n</lines>"
