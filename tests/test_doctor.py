"""The doctor names what is wrong, and the command that mends it, on real repositories, settings and folders."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import repositories
from hypothesis import given
from hypothesis import strategies as st
from repositories import git

from nightshift import config as configuration
from nightshift import doctor as surgery
from nightshift.doctor import Line, doctor, unmet
from nightshift.plumbing import LOCK_PATIENCE_S

isolated = pytest.fixture(autouse=True)(repositories.isolated)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that is ready, on a machine that shows no GPU and holds no key."""
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    root = repositories.make(tmp_path / "repo")
    for name in ("pyproject.toml", "config.yaml"):
        shutil.copy(configuration.ROOT / name, root)
    return root


def told(root: Path, capsys: pytest.CaptureFixture[str], code: int) -> dict[str, str]:
    """What the doctor says, by matter; of several lines on one matter those that are not ok, else the last."""
    capsys.readouterr()
    assert doctor(root) == code
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == ("a night cannot run yet: mend what is WRONG, then ask again" if code else "ready: `make night`")
    found: dict[str, str] = {}
    for line in lines:
        mark, matter, text = line.split(None, 2)
        if mark != "ok" or not re.match("note|WRONG", found.get(matter, "")):
            found[matter] = f"{mark} {text}"
        assert mark == "ok" or "`" in text or "put " in text or "did you mean" in text or "it takes" in text
    return found


def test_a_machine_that_is_ready(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(root, capsys, 0)
    assert set(found) >= {"python", "packages", "git", "sandbox", "config", "gpu", "data", "proposer", "disk", "memory"}
    assert "train.py is as committed" in found["git"] and "demo" in found["config"]
    assert "`python prepare.py --profile demo`" in found["data"] or not found["gpu"].startswith("ok none")
    assert git(root, "status", "--porcelain", "--untracked-files=no") == ""


def test_it_is_quick_and_does_without_torch(root: Path) -> None:
    code = "import sys; from pathlib import Path; from nightshift.doctor import doctor; doctor(Path(sys.argv[1]))"
    loaded = f"{code}; print({{'torch', 'pyarrow', 'anthropic'}} & {{*sys.modules}})"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", loaded, root], capture_output=True, text=True, cwd=configuration.ROOT)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr
    assert time.monotonic() - began < (60 if "driver" in done.stdout else 6)


def test_a_missing_package_is_told_before_anything_needs_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyproject = root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"numpy"', '"no-such-package-at-all", "numpy<1"'))
    found = told(root, capsys, 1)
    wanted = r"WRONG no no-such-package-at-all, numpy \S+ where <1 is wanted: `.* pip install -e \.`"
    assert re.fullmatch(wanted, found["packages"])
    assert "git" not in found


def test_it_runs_where_nothing_is_installed(tmp_path: Path) -> None:
    package = shutil.copytree(configuration.ROOT / "nightshift", tmp_path / "nightshift")
    shutil.copy(configuration.ROOT / "pyproject.toml", tmp_path)
    assert package.is_dir()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
                           "import runpy; runpy.run_module('nightshift.doctor', run_name='__main__')"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "no torch, no triton, no numpy" in done.stdout, done.stderr


@pytest.mark.parametrize(("bound", "met"), [
    ("", True), (">=0.1", True), (">=999", False), ("<=0.1", False), ("<999,>=0.1", True), ("<999,>=998", False),
    ("!=999", True), ("==999", False),
])
def test_bounds_are_read(bound: str, met: bool) -> None:
    assert bool(unmet(f"numpy{bound}")) is not met


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_releases_compare_by_their_numbers(a: list[int], b: list[int]) -> None:
    def wide(numbers: list[int]) -> list[int]:
        return numbers + [0] * (4 - len(numbers))

    left, right = (surgery._release(".".join(map(str, numbers)) + "+cu130") for numbers in (a, b))
    assert (left <= right) == (wide(a) <= wide(b))


def test_its_own_torch_is_within_the_bounds() -> None:
    assert not unmet(f"torch=={importlib.metadata.version('torch').partition('+')[0]}")


# The repository


def test_no_repository(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / ".git")
    assert "git init" in told(root, capsys, 1)["git"]


def test_no_commit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / ".git")
    git(root, "init", "-q")
    assert "in no commit yet" in told(root, capsys, 1)["git"]


@pytest.mark.parametrize("staged", [False, True])
def test_an_edited_train_py(root: Path, capsys: pytest.CaptureFixture[str], staged: bool) -> None:
    (root / "train.py").write_text("edited = True\n")
    if staged:
        git(root, "add", "train.py")
    words = "(staged)" if staged else "(not staged)"
    found = told(root, capsys, 1)["git"]
    assert words in found
    command = re.findall("`(.*?)`", found)[-1]
    git(root, *command.split()[1:])
    assert told(root, capsys, 0)["git"].startswith("ok")


def test_a_stale_index_lock(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = root / ".git/index.lock"
    lock.touch()
    os.utime(lock, (time.time() - 10 * LOCK_PATIENCE_S,) * 2)
    assert f"`rm {lock}`" in told(root, capsys, 1)["git"]


def test_a_merge_in_progress(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / ".git/MERGE_HEAD").write_text(git(root, "rev-parse", "HEAD") + "\n")
    assert "`git merge --abort`" in told(root, capsys, 1)["git"]


def test_no_git(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "bin"
    folder.mkdir()
    for name in ("setpriv", "unshare", "true"):
        (folder / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(folder))
    assert told(root, capsys, 1)["git"] == "WRONG is not installed: `sudo apt install git`"


# The sandbox


def test_without_setpriv_nothing_can_be_started(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "bin"
    folder.mkdir()
    for name in ("git", "env"):
        (folder / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(folder))
    assert "no setpriv and no unshare on PATH: `sudo apt install util-linux`" in told(root, capsys, 1)["sandbox"]


@pytest.mark.parametrize(("name", "value", "mend"), [
    ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns=0"),
    ("user/max_user_namespaces", "0", "user.max_user_namespaces=15000"),
    ("user/max_user_namespaces", "100", "--security-opt seccomp=unconfined"),
])
def test_what_forbids_namespaces_is_found(tmp_path: Path, name: str, value: str, mend: str) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(f"{value}\n")
    assert mend in surgery._namespaces_mend(tmp_path)


def test_data_in_a_folder_that_runs_may_read_is_no_matter(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DATA", "/usr/share/nightshift")
    assert "/usr" not in told(root, capsys, 0)["sandbox"]


# Settings, data, proposer


def test_settings_that_do_not_load(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "config.yaml"
    text = path.read_text()
    path.write_text(text + "  mine:\n    budgets: 3\n")
    assert "note" in (found := told(root, capsys, 0))["config"] and "did you mean 'budget_s'" in found["config"]
    path.write_text(text.replace("budget_s: 300.0", "budget_s: long"))
    assert "WRONG" in told(root, capsys, 1)["config"]
    path.unlink()
    assert "`git checkout -- config.yaml`" in told(root, capsys, 1)["config"]


def test_a_corpus_that_is_not_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "config.yaml"
    path.write_text(re.sub("source: .*", f"source: local:{root}/nowhere", path.read_text()))
    assert f"WRONG {root}/nowhere is not there" in told(root, capsys, 1)["data"]


def test_a_key_is_told_of_and_never_shown(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "config.yaml"
    path.write_text(path.read_text().replace("proposer: auto", "proposer: anthropic"))
    assert "`export ANTHROPIC_API_KEY=...`" in told(root, capsys, 1)["proposer"]
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    found = told(root, capsys, 0)
    assert "ANTHROPIC_API_KEY is set" in found["proposer"] and "secret" not in "".join(found.values())


# The hardware


def test_no_room_on_the_disk(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgery, "ROOM_GB", 1e9)
    assert "note" in told(root, capsys, 0)["disk"]
    monkeypatch.setattr(surgery, "LEAST_GB", 1e9)
    assert "GB are free at" in told(root, capsys, 1)["disk"]


def test_little_shared_memory_matters_between_gpus(tmp_path: Path) -> None:
    assert surgery._shared_memory(1, tmp_path / "none").mark == "ok"
    line = surgery._shared_memory(8, tmp_path / "none")
    assert line.mark == "note" and "--shm-size" in line.text


def test_a_gpu_that_torch_cannot_use_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "TRIAL", "raise RuntimeError('driver too old')")
    line = surgery._trial("400.1")
    assert line.mark == "WRONG" and "driver 400.1; torch cannot use it (RuntimeError: driver too old)" in line.text
    monkeypatch.setattr(surgery, "TRIAL", "print('13.0')")
    assert surgery._trial("580.2") == Line("ok", "gpu", "driver 580.2; torch computes with CUDA 13.0")
    monkeypatch.setattr(surgery, "TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(surgery, "TRIAL_S", 0.2)
    assert surgery._trial("580.2").mark == "WRONG"


@pytest.mark.gpu
def test_gpus_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nightshift import devices

    if not devices.gpu_names():
        pytest.skip("no GPU here")
    doctor(root)
    out = capsys.readouterr().out
    assert "torch computes with CUDA" in out and f"GPU 0: {devices.gpu_names()[0]}" in out


def test_a_compiler_is_needed_for_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert [line.mark for line in surgery._compiler(False)] == ["ok"]
    assert [line.text for line in surgery._compiler(True)] == ["no C compiler (gcc, clang, cc): `sudo apt install gcc`"]
