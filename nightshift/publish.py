"""A night as others read it: experiments/<tag>/ with the journal and a folder a run, and the summary block.

    journal.jsonl             the truth, copied
    <number>/proposal.md      of a candidate: title, hypothesis, what was expected
    <number>/change.diff      of a candidate: against the incumbent's train.py at that time
    <number>/run.log          the last lines that the run printed
    <number>/result.json      the row, whole
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import asdict
from pathlib import Path

from nightshift import ledger
from nightshift.branch import Branch
from nightshift.ledger import Row, State
from nightshift.scorer import tail
from nightshift.values import Run, Score

LOG_LINES = 100


def write_records(root: Path, live: Path, state: State, branch: Branch) -> Path:
    """Brings experiments/<tag>/ up to date with the night in `live`; returns it. Stop where it cannot be written."""
    folder = root / "experiments" / str(state.night["tag"])
    for row in state.rows:
        for name, text in _record(row, live, branch).items():
            path = folder / f"{row.number:03d}" / name
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                ledger.write_atomically(path, text)
    ledger.write_atomically(folder / "journal.jsonl", (live / "journal.jsonl").read_text(encoding="utf-8"))
    return folder


def _record(row: Row, live: Path, branch: Branch) -> dict[str, str]:
    record = {"result.json": json.dumps(asdict(row), indent=1, ensure_ascii=False) + "\n"}
    log = tail(live / "runs" / f"{row.number:03d}" / "run.log", LOG_LINES)
    if log:
        record["run.log"] = "\n".join(map(printable, log.splitlines())) + "\n"
    if row.kind == "candidate":
        hypothesis = "\n".join(map(printable, row.hypothesis.splitlines()))
        family = f"family: {ledger.clean(row.family)}\nproposer: {row.proposer}\n"
        record["proposal.md"] = f"# {ledger.clean(row.title)}\n\n{hypothesis}\n\n{family}"
        record["change.diff"] = branch.diff(row.parent_blob, row.blob)
    return record


def printable(line: str) -> str:
    """A line without what a terminal would obey, its white space as it was."""
    return "".join(c for c in line if c == "\t" or unicodedata.category(c) not in ledger.OBEYED)


def summary_block(run: Run, score: Score, total_s: float, peak_flops: float) -> str:
    """What a run prints last, in the field's own form. MFU is 0 where the device's peak rate is not known."""
    rate = run.flops_per_token * run.tokens / run.train_s if run.train_s else 0.0
    figures = {
        "val_bpb": f"{score.splits['val'].bpb:.6f}",
        "training_seconds": f"{run.train_s:.1f}",
        "total_seconds": f"{total_s:.1f}",
        "peak_vram_mb": f"{run.peak_memory_mb:.1f}",
        "mfu_percent": f"{100 * rate / peak_flops if peak_flops else 0:.2f}",
        "total_tokens_M": f"{run.tokens / 1e6:.1f}",
        "num_steps": str(run.steps),
        "num_params_M": f"{run.num_params / 1e6:.1f}",
    }
    return "---\n" + "\n".join(f"{name + ':':<17} {value}" for name, value in figures.items())
