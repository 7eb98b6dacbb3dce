"""Whether the ledger can be believed: `python loop.py verify`, a line a check, for every night that lies here.

The journal is the truth, so first its own chain is checked, then everything else against it: the published copy, the
commits, the diffs and records of experiments/, and the decisions, which are made again from the recorded scores.
What a clone need not have (a branch, the candidates' commits) is skipped and said so. Of all files only results.tsv is
written: it is a view, and comes back from the journals.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nightshift import decide, ledger, rejudge
from nightshift.journal import Event, parse
from nightshift.ledger import Row, State
from nightshift.plumbing import Repository
from nightshift.proposers.replay import apply_patch
from nightshift.rejudge import MALFORMED
from nightshift.values import Reject, SplitScore, Stop

SHOWN = 3  # faults that a check names; the rest it counts


@dataclass(frozen=True)
class Finding:
    """What one check found. Nothing wrong and nothing checked is a check that was skipped."""

    check: str
    wrong: list[str]
    checked: str = ""  # in words, where nothing is wrong
    skipped: str = ""  # what could not be looked at, and why

    def __str__(self) -> str:
        if self.wrong:
            more = len(self.wrong) - SHOWN
            told = "; ".join(self.wrong[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
            return f"  WRONG {self.check:<11} {told}"
        mark = "ok" if self.checked else "--"
        return f"  {mark:<5} {self.check:<11} " + "; ".join(part for part in (self.checked, self.skipped) if part)


@dataclass(frozen=True)
class Evidence:
    """A night, and what bears on it."""

    tag: str
    events: list[Event]
    state: State
    records: Path  # experiments/<tag>
    published: State  # as far as the copy there goes; without rows where there is none
    git: Git | None
    texts: dict[str, bytes]  # train.py by blob: what git has, and what the diffs rebuild


def verify(root: Path) -> int:
    """Prints what every check of every night found; 1 where anything is wrong, else 0. Brings results.tsv back."""
    results = root / "results.tsv"
    before = results.read_text() if results.is_file() else None  # first: a night that runs may add to both meanwhile
    journals = ledger.journals(root)
    if not journals:
        print("no night lies here yet: `python loop.py run` begins one")
        return 0 if before is None else 1
    git = Git.of(root)
    nights: dict[str, list[Event]] = {}
    wrong = False
    for tag, path in journals.items():
        print(f"night {tag}")
        for finding in _night(root, tag, path, git, nights):
            print(finding)
            wrong = wrong or bool(finding.wrong)
    print("all nights")
    finding = _results(results, before, nights, complete=len(nights) == len(journals))
    print(finding)
    return int(wrong or bool(finding.wrong))


def _night(root: Path, tag: str, path: Path, git: Git | None, nights: dict[str, list[Event]]) -> Iterator[Finding]:
    """One night's findings; its events are added to `nights` once its journal has proved sound."""
    records = root / "experiments" / tag
    text = path.read_bytes()
    try:
        events, length = parse(text, str(path))
        state = ledger.fold(events)
    except Stop as stop:
        yield Finding("journal", [str(stop)])
        return
    except MALFORMED as error:
        yield Finding("journal", [f"{path}: an event cannot be followed ({type(error).__name__}: {error})"])
        return
    if not state.night:
        yield Finding("journal", [], skipped="it holds no event yet")
        return
    nights[tag] = events
    torn = "" if length == len(text) else "its last line was cut off in writing, and the next run drops it"
    yield Finding("journal", [], f"{len(events)} events, {len(state.rows)} runs, unbroken chain", torn)
    copy = _published(path, text, records / "journal.jsonl")
    yield copy
    published = state if copy.checked else State()
    if copy.checked:
        published = ledger.fold(parse((records / "journal.jsonl").read_bytes())[0])
    night = Evidence(tag, events, state, records, published, git, git.texts(state) if git else {})
    for check in (_commits, _branch, _diffs, _records, _decisions):  # _decisions needs the texts that _diffs rebuilds
        yield check(night)


def _published(live: Path, text: bytes, copy: Path) -> Finding:
    """experiments/ holds the beginning of the journal, or all of it."""
    if live == copy:
        return Finding("published", [], f"{copy.parent.name}/journal.jsonl is all there is of this night")
    if not copy.is_file():
        return Finding("published", [], skipped="nothing is published of this night yet")
    if not text.startswith(copy.read_bytes()):
        return Finding("published", [f"{copy} is not the beginning of {live}: one of the two was changed"])
    rest = text[copy.stat().st_size :].count(b"\n")
    return Finding("published", [], "the published journal is the live one" + f" but for its last {rest}" * bool(rest))


class Git:
    """What git knows, asked about all objects of a night at once: a process a question, not an object."""

    def __init__(self, repo: Repository) -> None:
        self.repo = repo
        self.train_py = repo.places[2] + "train.py"  # from the top of the repository

    @classmethod
    def of(cls, root: Path) -> Git | None:
        """The repository around `root`, or None where there is none."""
        repo = Repository(root, "`python loop.py verify`")
        return None if repo.run("rev-parse", "--git-dir")[0] else cls(repo)

    def objects(self, names: Iterable[str]) -> dict[str, str]:
        """Name → hash of what git has; what it has not is left out."""
        asked = [name for name in dict.fromkeys(names) if "\n" not in name]
        stdin = "".join(f"{name}\n" for name in asked).encode()
        lines = self.repo.git("cat-file", "--batch-check=%(objectname)", stdin=stdin).decode().splitlines()
        return {name: line for name, line in zip(asked, lines, strict=True) if re.fullmatch("[0-9a-f]+", line)}

    def texts(self, state: State) -> dict[str, bytes]:
        """The train.py of every run that git has, by blob."""
        wanted = {state.night["blob"], *(r.blob for r in state.rows), *(r.parent_blob for r in state.rows)}
        blobs = self.objects(wanted)
        out = self.repo.git("cat-file", "--batch", stdin="".join(f"{blob}\n" for blob in blobs).encode())
        texts = {}
        for blob in blobs:
            head, _, out = out.partition(b"\n")
            size = int(head.split()[2])
            texts[blob], out = out[:size], out[size + 1 :]
        return {blob: text for blob, text in texts.items() if blob_of(text, like=blob) == blob}

    def tip(self, tag: str) -> str:
        """The commit of the night's branch, here or on a remote; "" where no branch of this name is known."""
        name = f"autoresearch/{tag}"
        refs = self.repo.git("for-each-ref", "--format=%(objectname)", f"refs/heads/{name}", f"refs/remotes/*/{name}")
        return next(iter(refs.decode().split()), "")

    def changed(self, commits: Iterable[str]) -> dict[str, list[str]]:
        """Commit → the files in which it differs from its parent, by their paths from the top."""
        found: dict[str, list[str]] = {commit: [] for commit in commits}
        options = ["--stdin", "-r", "--root", "--name-only", "--no-renames", "--no-ext-diff"]
        out = self.repo.git("diff-tree", *options, stdin="".join(f"{commit}\n" for commit in found).encode())
        commit = ""
        for line in out.decode(errors="replace").splitlines():
            if line in found:
                commit = line
            else:
                found[commit].append(line)
        return found

    def ancestors(self, tip: str, base: str) -> set[str]:
        """The commits from `base` on, it and the tip included; without `base` all of them."""
        known = self.objects([base])
        since = self.repo.git("rev-list", tip, *(f"^{commit}" for commit in known)).decode().split()
        return {*since, *known}


def blob_of(text: bytes, like: str) -> str:
    """git's name for a blob with these bytes, in the hash that the name `like` is in."""
    algorithm = hashlib.sha256 if len(like) == 64 else hashlib.sha1
    return algorithm(b"blob %d\0" % len(text) + text).hexdigest()


def _commits(night: Evidence) -> Finding:
    """Wherever git has a run's commit, its train.py is the one that the journal names."""
    if night.git is None:
        return Finding("commits", [], skipped="there is no git repository here")
    in_tree = {row.number: f"{row.commit}:{night.git.train_py}" for row in night.state.rows}
    refs = {row.number: f"refs/nightshift/{night.tag}/{row.number}:{night.git.train_py}" for row in night.state.rows}
    found = night.git.objects([*in_tree.values(), *refs.values()])
    wrong = []
    for row in night.state.rows:
        for where, name in ((f"commit {row.commit[:10]}", in_tree[row.number]), ("its ref", refs[row.number])):
            if found.get(name, row.blob) != row.blob:
                wrong.append(f"run {row.number}: {where} has train.py {found[name][:10]}, not {row.blob[:10]}")
    here = sum(name in found for name in in_tree.values())
    missing = len(in_tree) - here
    return Finding(
        "commits",
        wrong,
        f"{here} runs: git has the train.py that the journal names" * bool(here),
        f"{missing} runs' commits are not in this clone" * bool(missing),
    )


def _branch(night: Evidence) -> Finding:
    """Every keep and every taking back lies on the night's branch, and changes train.py alone."""
    moves = {e["moves_to"]: e["number"] for e in night.events if e["event"] == "decide" and e["moves_to"]}
    if night.git is None or not moves:
        return Finding("branch", [], skipped="there is no git repository here" if moves else "nothing was kept")
    here = night.git.objects(moves)
    wrong = [
        f"run {moves[commit]}: commit {commit[:10]} changes {', '.join(files)}, not train.py alone"
        for commit, files in night.git.changed(here).items()
        if not {*files} <= {night.git.train_py}
    ]
    tip = night.git.tip(night.tag)
    if not tip:
        seen = f"{len(here)} commits of keeps change train.py alone" * bool(here)
        return Finding("branch", wrong, seen, f"this clone has no branch autoresearch/{night.tag}")
    on_branch = night.git.ancestors(tip, night.state.night["base"])
    if tip == night.state.tip_before:
        on_branch.add(night.state.tip)  # the next run makes this move, which a kill came before
    off = [commit for commit in moves if commit not in on_branch]
    wrong += [f"run {moves[c]}: commit {c[:10]} is not on autoresearch/{night.tag}" for c in off]
    return Finding("branch", wrong, f"{len(moves)} moves lie on autoresearch/{night.tag}, each of train.py alone")


def _diffs(night: Evidence) -> Finding:
    """change.diff, applied to the parent's train.py, gives the blob that ran; so no candidate's commit is needed."""
    wrong, rebuilt, unknown = [], 0, 0
    for row in night.published.rows:
        if row.kind != "candidate":
            continue
        path = night.records / f"{row.number:03d}" / "change.diff"
        parent = night.texts.get(row.parent_blob)
        if not path.is_file():
            wrong.append(f"run {row.number}: {path} is missing")
        elif parent is None:
            unknown += 1
        elif (text := _patched(parent, path.read_bytes())) is None or blob_of(text, row.blob) != row.blob:
            wrong.append(f"run {row.number}: {path} does not give the train.py {row.blob[:10]} that ran")
        else:
            night.texts[row.blob] = text
            rebuilt += 1
    skipped = f"{unknown} start from a train.py that is not in this clone" * bool(unknown)
    skipped = skipped or "no candidate is published" * (not rebuilt)
    return Finding("diffs", wrong, f"{rebuilt} rebuild the train.py that ran, to the byte" * bool(rebuilt), skipped)


def _patched(parent: bytes, diff: bytes) -> bytes | None:
    try:
        return apply_patch(parent.decode(), diff.decode(), "change.diff").encode() if diff else parent
    except (Reject, UnicodeDecodeError):
        return None


def _records(night: Evidence) -> Finding:
    """result.json is the run as the journal has it, when it was published or now (a keep may be taken back since)."""
    wrong = []
    for row in night.published.rows:
        path = night.records / f"{row.number:03d}" / "result.json"
        now = night.state.rows[row.number - 1]
        try:
            stored = _row(json.loads(path.read_bytes()))
        except FileNotFoundError:
            wrong.append(f"run {row.number}: {path} is missing")
        except MALFORMED as error:
            wrong.append(f"run {row.number}: {path} is no record of a run ({error})")
        else:
            if stored not in (row, now):
                theirs, ours = asdict(stored), asdict(now)
                names = ", ".join(name for name in ours if theirs[name] != ours[name])
                wrong.append(f"run {row.number}: {path} differs from the journal in {names}")
    count = len(night.published.rows)
    return Finding("records", wrong, f"{count} result.json agree" * bool(count), "none is published" * (not count))


def _row(stored: dict[str, Any]) -> Row:
    """A result.json as a Row; what this version does not know is left out, what it lacks has its default."""
    known = {name: stored[name] for name in Row.__dataclass_fields__ if name in stored}
    return Row(**known | {"scores": {name: SplitScore(**split) for name, split in known["scores"].items()}})


def _decisions(night: Evidence) -> Finding:
    """What ran next, what became of it, what is claimed: all made again from what was recorded before."""
    rules = night.events[0].get("rules", 1) if night.events else decide.RULES
    if rules != decide.RULES:
        skipped = f"made by version {rules} of the rules; these are version {decide.RULES}"
        return Finding("decisions", [], skipped=skipped)
    wrong, made, unknown = rejudge.faults(night.events, night.texts)
    skipped = f"{unknown} runs' changes are not in this clone" * bool(unknown) or "none so far" * (not made)
    return Finding("decisions", wrong, f"{made} follow from what was recorded before them" * bool(made), skipped)


def _results(path: Path, before: str | None, nights: dict[str, list[Event]], complete: bool) -> Finding:
    """results.tsv is what the journals say; where it is not, it is written anew."""
    if not complete:
        return Finding("results.tsv", [], skipped="left as it is, since not every journal can be read")
    wanted = _rebuilt(nights.values())
    count = f"{wanted.count(chr(10)) - 1} runs of {len(nights)} nights"
    if before is not None and sorted(before.splitlines()) == sorted(wanted.splitlines()):
        return Finding("results.tsv", [], f"{count}, as the journals have them")
    ledger.write_atomically(path, wanted)
    if before is None:
        return Finding("results.tsv", [], f"{count}; it was missing, and is rebuilt from the journals")
    if before in _one_run_behind(nights):
        return Finding("results.tsv", [], f"{count}; it was a run behind its journal, and is up to date now")
    kept, lines = set(wanted.splitlines()), before.splitlines()
    number = next((n for n, line in enumerate(lines, 1) if line not in kept), len(lines) + 1)
    return Finding("results.tsv", [f"line {number} was not what the journals say; it is rebuilt from them"])


def _rebuilt(nights: Iterable[list[Event]]) -> str:
    return ledger.results_tsv(sorted((ledger.fold(events) for events in nights), key=lambda s: s.night["at"]))


def _one_run_behind(nights: dict[str, list[Event]]) -> Iterator[str]:
    """What results.tsv is after a kill between a run's decision and the view of it; a night of many."""
    for tag, events in nights.items():
        decided = [n for n, event in enumerate(events) if event["event"] == "decide"]
        if decided:
            yield _rebuilt((nights | {tag: events[: decided[-1]]}).values())
