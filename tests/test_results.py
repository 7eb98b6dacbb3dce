"""results.tsv: the field's columns, then ours; a line a run, whatever a title holds and wherever the journal lies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import begin, draft, night, play, scored

from nightshift import ledger
from nightshift.config import ROOT
from nightshift.journal import Journal
from nightshift.ledger import COLUMNS, clean, results_tsv
from nightshift.night import Ledger
from nightshift.values import Reject, Stop

DESIGN_COLUMNS = (
    "commit val_bpb memory_gb status description night number kind parent seed delta p_better val_loss "
    "steps tokens_M train_s total_s usd proposer profile device"
)


def rows_of(tsv: str) -> list[dict[str, str]]:
    header, *lines = tsv.rstrip("\n").split("\n")
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


def test_columns_are_the_designs() -> None:
    assert " ".join(COLUMNS) == DESIGN_COLUMNS
    assert results_tsv([]) == DESIGN_COLUMNS.replace(" ", "\t") + "\n"


def test_a_line_a_run_and_what_each_says() -> None:
    sheet = night(1.0, 1.001, 0.999, sentinel_every=2, claim_per_arm=2, max_experiments=4)
    play(sheet, scored(0.996))
    play(sheet, Reject("crash", "CUDA out of memory\nmore\nlines"))
    play(sheet, scored(1.05))  # a sentinel: takes run 4 back
    play(sheet, scored(0.5), unhealthy="a stranger's process used the GPU")
    play(sheet, scored(0.996))
    play(sheet, Reject("timeout", "trained for too long"))
    rows = rows_of(results_tsv([sheet.state]))
    assert [r["number"] for r in rows] == [str(n) for n in range(1, 10)]
    assert [r["kind"] for r in rows] == ["baseline"] * 3 + ["candidate"] * 2 + ["sentinel"] + ["candidate"] * 3
    assert " ".join(r["status"] for r in rows) == "keep keep keep discard crash keep discard keep timeout"
    assert rows[3]["description"] == "change 1 (taken back by sentinel 6)"
    assert rows[3]["commit"] == "keep-4" and rows[7]["commit"] == "keep-8"
    assert rows[4]["description"] == "change 2 (CUDA out of memory)"
    assert (rows[4]["val_bpb"], rows[4]["memory_gb"], rows[4]["val_loss"]) == ("0.000000", "0.0", "")
    assert (rows[8]["val_bpb"], rows[8]["memory_gb"], rows[8]["delta"]) == ("0.000000", "0.0", "")
    assert (rows[0]["val_bpb"], rows[0]["memory_gb"], rows[0]["delta"]) == ("1.000000", "0.5", "")
    assert "does not count: a stranger's process" in rows[6]["description"]
    assert rows[7]["description"] == rows[6]["description"].split(" (")[0] == "change 3"
    assert rows[3]["delta"] == "-0.004000" and 0.5 < float(rows[3]["p_better"]) <= 1
    assert {r["night"] for r in rows} == {"nov20"} and {r["profile"] for r in rows} == {"demo"}
    assert rows[7]["parent"] == "0" and rows[0]["total_s"] == "10.0"


@settings(max_examples=80, deadline=None)
@given(title=st.text(st.characters(exclude_categories=["Cs"]), max_size=40), reason=st.text(max_size=60))
def test_no_title_or_reason_breaks_a_line(title: str, reason: str) -> None:
    sheet = night(1.0, 1.001, 0.999)
    draft(sheet, title, proposer="a\tb\nc")
    play(sheet, Reject("crash", reason))
    tsv = results_tsv([sheet.state])
    assert len(tsv.splitlines()) == tsv.count("\n") == 5  # splitlines cuts at everything that any tool cuts at
    row = rows_of(tsv)[3]
    assert row["description"].startswith(clean(title or "change 1"))
    assert row["proposer"] == "a b c"


def test_all_nights_oldest_first_the_live_journal_before_the_published_one(tmp_path: Path) -> None:
    def lived(folder: Path, runs: int) -> None:
        book = Ledger(Journal(folder / "journal.jsonl"))
        begin(book, tag=folder.name)
        for _ in range(runs):
            play(book, scored(1.0))

    lived(tmp_path / "experiments" / "nov20", 1)
    lived(tmp_path / ".nightshift" / "zebra", 3)
    lived(tmp_path / ".nightshift" / "nov20", 2)
    Journal(tmp_path / ".nightshift" / "nov21" / "journal.jsonl")  # a night that was killed before it began
    assert [len(state.rows) for state in ledger.nights(tmp_path)] == [3, 2]
    assert [row["night"] for row in rows_of(results_tsv(ledger.nights(tmp_path)))] == ["zebra"] * 3 + ["nov20"] * 2
    shutil.rmtree(tmp_path / ".nightshift")
    assert [len(state.rows) for state in ledger.nights(tmp_path)] == [1]


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.tsv"
    ledger.write_atomically(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    with pytest.raises(Stop, match="the journal is whole, and this file comes back from it"):
        ledger.write_atomically(path / "below", "x")
    assert os.listdir(tmp_path) == ["results.tsv"]


def test_results_are_utf8_whatever_the_locale_says(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from nightshift import ledger; " \
           "ledger.write_atomically(Path(sys.argv[1]), '\\u03c3\\n')"
    plain = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "results.tsv")], env=plain, check=True)
    assert (tmp_path / "results.tsv").read_bytes() == "σ\n".encode()
