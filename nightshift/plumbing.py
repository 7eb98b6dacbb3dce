"""One git command at a time, safe from the caller's environment and the person's configuration.

`Repository` says what stands there and builds objects; what the night does with them is `branch`'s.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from git import Git

from nightshift.values import Stop

LOCK_PATIENCE_S = 5.0  # git holds index.lock for milliseconds; one that is older may have lost its owner
DETACHED = "(detached)"  # what git status calls a HEAD that is on no branch
UNBORN = "(initial)"  # and a HEAD whose branch has no commit

# The person's configuration must neither run programs, ask for keys, nor change what the night's commands do.
SETTINGS = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.splitIndex": "false",
    "commit.gpgSign": "false",
    "merge.verifySignatures": "false",
    "submodule.recurse": "false",
    "i18n.commitEncoding": "UTF-8",
    "log.showSignature": "false",
    "diff.autoRefreshIndex": "true",
    "gc.auto": "0",
    "maintenance.auto": "false",
}
# Any other GIT_ variable may point git at another repository, index or identity, so git does not get to see it.
KEPT_VARIABLES = ("GIT_CONFIG_", "GIT_EXEC_PATH", "GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM")


@dataclass(frozen=True)
class State:
    """HEAD and train.py, as one `git status` sees them."""

    head: str  # commit of HEAD, or UNBORN
    on: str  # the branch that HEAD is on, or DETACHED
    edits: str = ""  # "staged", "not staged" or both, where train.py is not as committed
    blobs: tuple[str, str] = ("", "")  # of an edited train.py: in HEAD and in the index


def git_at_work(top: Path) -> bool:
    """Whether a git process runs inside the work tree `top`; False where the system has no /proc to ask.

    An open lock file would not do as the sign: `git commit -a` closes it while its editor waits for the person.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is not ours to look at
            if (process / "comm").read_text().startswith("git") and (process / "cwd").readlink().is_relative_to(top):
                return True
    return False


class Repository:
    """The git repository around the folder `root`. `again` is the command that a Stop tells the person to repeat.

    Whatever git refuses is a Stop with its own words. Hooks never run, nothing is signed, no configuration is written.
    """

    def __init__(self, root: Path, again: str) -> None:
        self.root = root.absolute()
        self.again = again

    def run(self, *args: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> tuple[int, bytes, str]:
        """Exit status, standard output and standard error of one git command in `root`.

        The program `env` takes variables away, since GitPython hands on all of os.environ. A session of its own keeps
        a person's Ctrl-C from cutting git off halfway.
        """
        unset = [f"-u{name}" for name in os.environ if name.startswith("GIT_") and not name.startswith(KEPT_VARIABLES)]
        add = [f"{name}={value}" for name, value in (env or {}).items()]
        settings = [word for key, value in SETTINGS.items() for word in ("-c", f"{key}={value}")]
        command = ["env", *unset, *add, "git", "-C", str(self.root), *settings, *args]
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            status, out, words = Git().execute(
                command,
                istream=file,
                with_extended_output=True,
                with_exceptions=False,
                stdout_as_string=False,
                strip_newline_in_stdout=False,
                start_new_session=True,
            )
        return int(status), bytes(out or b""), str(words)

    def git(self, *args: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> bytes:
        """Standard output of a git command that must succeed."""
        status, out, words = self.run(*args, stdin=stdin, env=env)
        if status:
            raise self.failed(args, words)
        return out

    def failed(self, args: tuple[str, ...], words: str) -> Stop:
        """The Stop that says what git said."""
        command = " ".join(args[:2])
        return Stop(f"`git {command}` failed:\n{words.strip()}\nOnce that is mended, {self.again} goes on from here.")

    def resolve(self, revision: str) -> str:
        """The full hash that `revision` names, or "" where it names nothing."""
        status, found, words = self.run("rev-parse", "--quiet", "--verify", revision)
        if status and words:
            raise self.failed(("rev-parse", revision), words)
        return found.decode().strip()

    @cached_property
    def places(self) -> tuple[Path, Path, str]:
        """The git directory, the top of the work tree, and the path from there to `root`, "" or ending in a slash."""
        found = self.git("rev-parse", "--absolute-git-dir", "--show-toplevel", "--show-prefix")
        git_dir, top, prefix = os.fsdecode(found).split("\n")[:3]
        return Path(git_dir), Path(top), prefix

    def state(self) -> State:
        """One process, limited to train.py; --no-optional-locks so that looking never takes the index's lock."""
        options = ["--porcelain=v2", "--branch", "--no-ahead-behind", "-z", "--untracked-files=no"]
        found = self.git("--no-optional-locks", "status", *options, "--ignore-submodules=all", "--", "train.py")
        lines = found.decode(errors="replace").split("\0")
        headers = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
        head, on = headers["branch.oid"], headers["branch.head"]
        entry = next((line.split(" ") for line in lines if line.startswith(("1 ", "u "))), None)
        if entry is None:
            return State(head, on)
        marks = zip(entry[1], ("staged", "not staged"), strict=True)
        edits = " and ".join(word for mark, word in marks if mark != ".")
        return State(head, on, edits, (entry[6], entry[7]) if entry[0] == "1" else ("", ""))

    def await_lock(self, needed: bool) -> None:
        """Stops on an index.lock whose owner is gone; where the index is `needed`, waits a while for a living one.

        Never removes it: only the person can know that no editor or tool of theirs still counts on it.
        """
        git_dir, top, _ = self.places
        lock = git_dir / "index.lock"
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                age = time.time() - lock.stat().st_mtime
            except FileNotFoundError:
                return
            if not (at_work := git_at_work(top)) and age > LOCK_PATIENCE_S:
                raise Stop(
                    f"{lock} is {age:.0f} s old and no git command is seen at work here: one was cut off and left it"
                    f" behind, and git refuses to work while it is there. `rm {lock}`, then {self.again}."
                )
            if not needed:
                return
            if at_work and time.monotonic() > deadline:
                raise Stop(f"Another git command holds {lock} (an open commit message?). End it, then {self.again}.")
            time.sleep(0.1)

    def tree(self, parent: str, entries: bytes) -> str:
        """`parent`'s tree changed by `entries`, in the form that `git update-index -z --index-info` reads."""
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": f"{folder}/index"}
            self.git("read-tree", parent, env=index)
            self.git("update-index", "-z", "--index-info", stdin=entries, env=index)
            return self.git("write-tree", env=index).decode().strip()

    def commit(self, tree: str, parent: str, message: str, at: float) -> str:
        """A commit object, dated `at`. NUL and lone surrogates, which git cannot hold, become " " and "?"."""
        text = message.replace("\0", " ").rstrip().encode(errors="replace") + b"\n"
        date = f"@{int(at)} +0000"
        env = {**self.identity, "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        return self.git("commit-tree", tree, "-p", parent, "-F", "-", stdin=text, env=env).decode().strip()

    @cached_property
    def identity(self) -> dict[str, str]:
        """The person's configured name and address, each else nightshift's own."""
        _, found, _ = self.run("config", "-z", "--get-regexp", r"^user\.(name|email)$")
        config = dict(entry.partition("\n")[::2] for entry in found.decode(errors="replace").split("\0"))
        name = config.get("user.name") or "nightshift"
        email = config.get("user.email") or "nightshift@localhost"
        return {
            "GIT_AUTHOR_NAME": name,
            "GIT_AUTHOR_EMAIL": email,
            "GIT_COMMITTER_NAME": name,
            "GIT_COMMITTER_EMAIL": email,
        }
