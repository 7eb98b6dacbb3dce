"""Proposes what lies in a folder, in name order: a person's own queue of ideas, and how tests drive the loop."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from nightshift.values import Brief, Proposal, Reject, Stop


class Replay:
    """Files NNN-some-title.patch (a unified diff of train.py) and NNN-some-title.py (a whole train.py).

    The folder is read anew each time, so that ideas can be added behind the last one while the night runs.
    """

    ahead = False

    def __init__(self, folder: Path) -> None:
        """Raises Stop with code 2 where there is nothing to replay."""
        self.name = f"replay:{folder}"
        self.folder = folder
        if not folder.is_dir():
            raise Stop(f"{self.name}: there is no folder {folder}; --proposer replay:DIR takes one that holds "
                       "NNN-some-title.patch or NNN-some-title.py files", 2)
        if not self._queue():
            raise Stop(f"{self.name}: {folder} holds no .patch and no .py file; `git diff train.py > "
                       f"{folder}/001-some-title.patch` makes one", 2)

    def _queue(self) -> list[Path]:
        return sorted(p for p in self.folder.iterdir() if p.suffix in (".patch", ".py") and p.is_file())

    def propose(self, brief: Brief) -> Proposal | None:
        """The first file that this night has not taken yet; None once the folder is exhausted.

        Raises Reject for a file that does not give a train.py; the next call takes the file after it.
        """
        others = sum(1 for past in brief.history if past.kind == "candidate" and past.proposer != self.name)
        queue, taken = self._queue(), max(0, brief.asked - others)
        if taken >= len(queue):
            return None
        path = queue[taken]
        title = re.sub(r"^\d+[-_ ]*", "", path.stem).replace("-", " ").strip() or path.stem
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise Reject("invalid", f"{path.name}: not UTF-8 text ({error})") from None
        train_py = text if path.suffix == ".py" else apply_patch(brief.train_py, text, path.name)
        return Proposal(title=title, hypothesis=f"{path.name}, queued by hand.", train_py=train_py, proposer=self.name)


def apply_patch(train_py: str, patch: str, name: str) -> str:
    """`train_py` with the unified diff `patch` applied, all of it or none, as `git apply` does it.

    Hunks may have moved by whole lines, their context may not have changed; the paths in the diff may carry the
    usual a/ and b/ or nothing. Raises Reject naming `name` where it does not apply or touches another file.
    """
    with tempfile.TemporaryDirectory(prefix="nightshift-replay-") as scratch:
        target = Path(scratch, "train.py")
        target.write_bytes(train_py.encode())
        complaint = ""
        for strip in ("-p1", "-p0"):
            listed = _git_apply(scratch, patch, strip, "--numstat", "-z")
            touched = [field.split("\t", 2)[-1] for field in listed.stdout.split("\0") if field]
            complaint = complaint or listed.stderr
            if touched == ["train.py"]:
                applied = _git_apply(scratch, patch, strip)
                if applied.returncode == 0 and target.is_file() and not target.is_symlink():
                    return target.read_bytes().decode()
                complaint = applied.stderr or "it deletes train.py"
                break
            if touched and strip == "-p1":
                complaint = f"it changes {', '.join(touched)}; only train.py may change"
    raise Reject("invalid", f"{name} does not apply to the incumbent's train.py: {' '.join(complaint.split())}")


def _git_apply(scratch: str, patch: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`git apply` in a folder that is no repository, and deaf to anybody's configuration."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    quiet = {"GIT_CEILING_DIRECTORIES": str(Path(scratch).parent), "GIT_CONFIG_GLOBAL": os.devnull,
             "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    return subprocess.run(["git", "apply", "--whitespace=nowarn", *options, "-"], cwd=scratch, env=kept | quiet,
                          input=patch, capture_output=True, encoding="utf-8", check=False)
