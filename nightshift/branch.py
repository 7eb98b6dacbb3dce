"""Git: candidates as commits of their own, and the night's branch, which only keeps and the ledger move.

Commits are built by plumbing, so the work tree, the index and HEAD stand still while the night works; `start`,
`resume`, `advance` and `publish` alone move something that a person sees, and refuse rather than touch their edits.
A commit depends on its arguments and the person's identity alone, so after a kill each step can be taken again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from nightshift.plumbing import DETACHED, UNBORN, Repository, State
from nightshift.values import Reject, Stop

# Files that git keeps while such a command waits for its end, which would then land on the night's branch.
IN_PROGRESS = {
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
    "rebase-merge": "rebase",
    "rebase-apply": "rebase",
}


class Branch:
    """The branch `autoresearch/<tag>` of the repository that holds `root`, the folder with train.py in it.

    Commits and blobs are full hashes, `at` is in seconds since the epoch. Every refusal, git's too, is a Stop.
    """

    def __init__(self, root: Path, tag: str) -> None:
        self.tag = tag
        self.name = f"autoresearch/{tag}"
        self.again = f"`python loop.py run --tag {tag}`"
        self.repo = Repository(root, self.again)
        self._ref = f"refs/heads/{self.name}"
        self._published_ref = f"refs/nightshift/{tag}/published"

    # What stands

    def head(self) -> str:
        """The commit of HEAD."""
        commit = self.repo.resolve("HEAD^{commit}")
        if not commit:
            raise Stop("There is no commit to start from yet. `git add -A && git commit -m start` makes one.")
        return commit

    def exists(self) -> bool:
        """Whether the night's branch is there."""
        return bool(self.repo.resolve(self._ref))

    def blob(self, commit: str) -> str:
        """The blob of train.py as `commit` has it."""
        blob = self.repo.resolve(f"{commit}:./train.py")
        if not blob:
            raise Stop(
                f"train.py is not in commit {commit[:12]}, so there is nothing for a night to change."
                " `git add train.py && git commit -m train.py` puts it into the next."
            )
        return blob

    def foreign(self, expected_tip: str) -> list[str]:
        """Commits on the branch since `expected_tip`, newest first, a line each: short hash and subject."""
        since = f"{expected_tip}..{self._ref}"
        log = self.repo.git("log", "--no-color", "--no-decorate", "--format=%h %s", since, "--")
        return log.decode(errors="replace").splitlines()

    # Beginning a night, and going on with one

    def start(self) -> str:
        """Creates the branch at HEAD's commit and puts HEAD on it; work tree and index are not touched.

        Returns that commit, the night's base. Refuses an edited train.py, and a branch of this name at another commit;
        one at this very commit is what a start that was cut off leaves behind, and is taken over.
        """
        base = self.head()
        self.repo.await_lock(needed=False)
        self._refuse_in_progress()
        self._refuse_edits(self.repo.state(), "`git commit -m train.py train.py` or `git stash push train.py`")
        try:
            self.read_blob(self.blob(base)).decode()
        except UnicodeDecodeError as error:
            raise Stop(f"train.py is not UTF-8 ({error}). Save it as UTF-8, commit it, then {self.again}.") from None
        tip = self.repo.resolve(self._ref)
        if not tip:
            self.repo.git("update-ref", "-m", "nightshift: start", self._ref, base, "")
            self.repo.git("symbolic-ref", "-m", f"nightshift: start {self.name}", "HEAD", self._ref)
        elif tip == base:
            self._switch()
        else:
            raise Stop(
                f"The branch {self.name} exists already, at {tip[:12]}, and HEAD is at {base[:12]}:"
                " a new night needs a name of its own. `python loop.py run --tag NAME`."
            )
        return base

    def resume(self, expected_tip: str, pending: str = "") -> str:
        """Puts HEAD back on the branch and returns the tip from which the night goes on.

        That is `expected_tip`, or `pending` (a keep or revert that the night may or may not have advanced to), or the
        ledger published on top of either, where a kill came before its commit was written down. An edited train.py
        is a matter for `check`, once `advance` has finished what was cut off.
        """
        self.repo.await_lock(needed=False)
        state = self.repo.state()
        tip = self.repo.resolve(self._ref)
        if not tip:
            raise self._gone(f"git update-ref {self._ref} {expected_tip}")
        if state.on == DETACHED:
            raise self._elsewhere(state)
        known = tip
        if tip == self.repo.resolve(self._published_ref):
            known = self.repo.resolve(f"{tip}^")
        if not {tip, known} & {expected_tip, pending}:
            raise self._moved(expected_tip, tip, state)
        if state.on != self.name:
            self._refuse_edits(state, "`git stash push train.py`")
            self._switch()
        return tip

    def check(self, expected_tip: str) -> None:
        """Between experiments: HEAD on the branch, its tip where the night left it, train.py as committed, or Stop."""
        self.repo.await_lock(needed=False)
        state = self.repo.state()
        self._require(state, expected_tip)
        self._refuse_edits(state, "`git stash push train.py`")

    # Objects: nothing that a person sees moves

    def write_blob(self, text: str) -> str:
        """The blob of exactly these characters in UTF-8, whatever core.autocrlf and filters say."""
        try:
            return self.repo.git("hash-object", "-w", "--stdin", stdin=text.encode()).decode().strip()
        except UnicodeEncodeError as error:
            raise Reject("crash", f"train.py has a character that UTF-8 cannot hold: {error.reason}") from None

    def read_blob(self, blob: str) -> bytes:
        """The blob's bytes as they are."""
        return self.repo.git("cat-file", "blob", blob)

    def candidate(self, number: int, blob: str, parent: str, message: str, at: float) -> str:
        """A commit of `parent`'s tree with `blob` as train.py, named by refs/nightshift/<tag>/<number>."""
        commit = self.keep(blob, parent, message, at)
        self.point(number, commit)
        return commit

    def point(self, number: int, commit: str) -> None:
        """Lets refs/nightshift/<tag>/<number> name `commit`, so that it stays readable and is never pruned."""
        self.repo.git("update-ref", f"refs/nightshift/{self.tag}/{number}", commit)

    def keep(self, blob: str, parent: str, message: str, at: float) -> str:
        """A commit of `parent`'s tree with `blob` as train.py, its file mode as before; `advance` moves to it."""
        entry = self.repo.git("ls-tree", "-z", "--full-name", parent, "--", "train.py")
        tree = self.repo.tree(parent, entry.replace(self.blob(parent).encode(), blob.encode()))
        return self.repo.commit(tree, parent, message, at)

    def revert(self, blob: str, parent: str, message: str, at: float) -> str:
        """A commit that takes a keep back: `blob` is the train.py from before it. `advance` moves to it."""
        return self.keep(blob, parent, message, at)

    # Moving the branch

    def advance(self, commit: str, expected_tip: str) -> None:
        """Fast-forwards the branch from `expected_tip` to `commit`; train.py and its index entry follow.

        Refuses rather than overwrite an edit. Already there: nothing happens. Where a kill left train.py written but
        the branch behind, it finishes.
        """
        self.repo.await_lock(needed=True)  # which a git that outlived a killed loop may still hold
        state = self.repo.state()
        if state.on == self.name and state.head == commit:
            return
        self._require(state, expected_tip)
        if state.edits:
            if not self._half_advanced(state, commit):
                self._refuse_edits(state, f"Commit {commit[:12]} waits to be kept. `git stash push train.py`")
            self.repo.git("reset", "--quiet", commit, "--", "train.py")
        options = ["--ff-only", "--quiet", "--no-stat", "--no-autostash", "--no-overwrite-ignore"]
        self.repo.git("merge", *options, commit)

    def publish(self, paths: Sequence[Path], message: str, at: float) -> str:
        """Commits files and folders of the work tree, byte for byte, on the branch's tip, and returns the new tip.

        Goes through an index of its own; in the person's index only these paths follow. What is gone from the work
        tree goes from the commit. Nothing new: no commit, and the tip as it was.
        """
        self.repo.await_lock(needed=True)
        tip = self.repo.resolve(self._ref)
        if not tip:
            raise self._gone(f"git branch {self.name} COMMIT")
        names = [str(path.relative_to(self.repo.root) if path.is_absolute() else path) for path in paths]
        tree = self.repo.tree(tip, self._removals(tip, names) + self._additions(names))
        commit = tip
        if tree != self.repo.resolve(f"{tip}^{{tree}}"):
            commit = self.repo.commit(tree, tip, message, at)
            moves = f"update {self._ref} {commit} {tip}\nupdate {self._published_ref} {commit}\n"
            self.repo.git("update-ref", "-m", "nightshift: publish", "--stdin", stdin=moves.encode())
        if self.repo.state().on == self.name:
            self.repo.git("reset", "--quiet", commit, "--", *names)
        return commit

    def _removals(self, tip: str, names: Sequence[str]) -> bytes:
        """Index entries that take away what `tip` has under `names`."""
        tracked = self.repo.git("ls-tree", "-r", "-z", "--full-name", "--name-only", tip, "--", *names)
        return b"".join(b"0 %s\t%s\0" % (b"0" * len(tip), name) for name in tracked.split(b"\0") if name)

    def _additions(self, names: Sequence[str]) -> bytes:
        """Index entries of what the work tree has under `names`."""
        root, prefix = self.repo.root, self.repo.places[2]
        files = [file for name in names for file in sorted([root / name, *(root / name).rglob("*")]) if file.is_file()]
        paths = os.fsencode("".join(f"{file}\n" for file in files))
        blobs = self.repo.git("hash-object", "-w", "--no-filters", "--stdin-paths", stdin=paths).split()
        inside = [os.fsencode(prefix + str(file.relative_to(root))) for file in files]
        return b"".join(b"100644 %s\t%s\0" % entry for entry in zip(blobs, inside, strict=True))

    # Comparing one train.py with another

    def diff(self, old_blob: str, new_blob: str) -> str:
        """A unified diff from a/train.py to b/train.py; empty where nothing differs.

        Without git's own `diff --git` header, under which `git apply` takes paths from the top of the repository and
        silently skips a train.py in a folder of it. So `git apply` and `patch -p1` both work in train.py's folder.
        """
        options = ["--text", "--no-color", "--no-ext-diff", "--no-textconv", "--unified=3", "--inter-hunk-context=0"]
        patch = self.repo.git("diff", *options, old_blob, new_blob).decode()
        _, at_sign, hunks = patch.partition("\n@@ ")
        return f"--- a/train.py\n+++ b/train.py{at_sign}{hunks}" if at_sign else ""

    def net_added(self, old_blob: str, new_blob: str) -> int:
        """Lines added less lines deleted, which is the difference in length whichever lines those are."""
        old, new = (len(BytesIO(self.read_blob(blob)).readlines()) for blob in (old_blob, new_blob))
        return new - old

    def merge3(self, base_blob: str, ours_blob: str, theirs_blob: str) -> str | None:
        """The text with both changes to `base_blob`, `ours_blob`'s and `theirs_blob`'s; None where they conflict."""
        texts = [self.read_blob(blob) for blob in (ours_blob, base_blob, theirs_blob)]
        if any(b"\0" in text for text in texts):
            return None  # git takes it for binary and merges nothing
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("ours", "base", "theirs")]
            for file, text in zip(files, texts, strict=True):
                file.write_bytes(text)
            status, merged, words = self.repo.run("merge-file", "--stdout", *map(str, files))
        if status > 127:  # up to there it is the number of conflicts
            raise self.repo.failed(("merge-file",), words)
        return None if status else merged.decode()

    # Refusing

    def _switch(self) -> None:
        """To the night's branch. results.tsv comes back from the journals, so it is not to stand in the way."""
        if self.repo.resolve("HEAD:./results.tsv"):
            self.repo.git("checkout", "--quiet", "HEAD", "--", "results.tsv")
        self.repo.git("switch", "--quiet", "--no-guess", "--no-overwrite-ignore", self.name)

    def _half_advanced(self, state: State, commit: str) -> bool:
        """Whether train.py's edits are no person's but those of an `advance` to `commit` that was cut off."""
        in_head, in_index = state.blobs
        if not in_index or in_index not in (in_head, self.blob(commit)):
            return False
        against = ["--name-only", "--no-ext-diff", commit, "--", "train.py"]
        return not self.repo.git("--no-optional-locks", "diff", *against)

    def _refuse_edits(self, state: State, way_out: str) -> None:
        if state.edits:
            raise Stop(
                f"train.py has edits that are not committed ({state.edits}). A night stands on committed bytes alone"
                f" and leaves yours as they are. {way_out}, then {self.again}."
            )

    def _refuse_in_progress(self) -> None:
        for file, command in IN_PROGRESS.items():
            if (self.repo.places[0] / file).exists():
                raise Stop(
                    f"A {command} is in progress here, and would end on the night's branch."
                    f" `git {command} --continue` or `git {command} --abort`, then {self.again}."
                )

    def _require(self, state: State, expected_tip: str) -> None:
        if state.on != self.name:
            raise self._elsewhere(state)
        if state.head == UNBORN:
            raise self._gone(f"git update-ref {self._ref} {expected_tip}")
        if state.head != expected_tip:
            raise self._moved(expected_tip, state.head, state)

    def _elsewhere(self, state: State) -> Stop:
        where = "detached, on no branch" if state.on == DETACHED else f"on {state.on}"
        return Stop(
            f"HEAD is {where}. This night keeps its results on {self.name} and moves no other branch."
            f" `git switch {self.name}`, then {self.again}."
        )

    def _gone(self, command: str) -> Stop:
        return Stop(
            f"The branch {self.name} is gone; its commits are still in git."
            f" `{command}` brings it back, then {self.again}."
        )

    def _moved(self, expected_tip: str, tip: str, state: State) -> Stop:
        commits = self.foreign(expected_tip)
        what = f"it was moved to {tip[:12]}."
        if commits:
            what = "foreign commits, which this night did not make, came on top:\n  " + "\n  ".join(commits)
        back = f"git branch -f {self.name} {expected_tip}"
        if state.on == self.name:
            back = f"git reset --keep {expected_tip}"
        return Stop(
            f"The night left {self.name} at {expected_tip[:12]}; since then {what}\n"
            "Scores to come would not compare with those so far."
            f" `git branch {self.tag}-mine {tip}` saves what is there under another name,"
            f" `{back}` puts the night's branch back, then {self.again}."
        )
