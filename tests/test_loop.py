"""The command line, and what a person can get wrong before a night begins or between two legs of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import checkouts
import pytest
from checkouts import TAG, Loop, call
from repositories import git

from nightshift import data
from nightshift.config import ROOT, Config

RUN = ("run", "--profile", "tiny", "--tag", TAG)


@pytest.fixture
def checkout(tmp_path: Path, tiny: Config) -> Path:
    return checkouts.make(tmp_path / "checkout", tiny, max_experiments=1)


@pytest.fixture
def begun(checkout: Path, data_home: Path) -> Path:
    """A checkout with a night that was killed in its first run."""
    loop = Loop(checkout, data_home, *RUN)
    loop.until(lambda: checkouts.state(checkout).running is not None)
    loop.kill()
    return checkout


def refused(root: Path, data_home: Path, *args: str, code: int = 1, **env: str) -> str:
    got, said = call(root, data_home, *args, **env)
    assert got == code, said
    assert "Traceback" not in said, said
    return said


def test_nothing_heavy_is_imported_for_a_command_line() -> None:
    heavy = ["torch", "pyarrow", "anthropic", "huggingface_hub", "matplotlib", "cmaes"]
    ask = f"import loop, prepare, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("written", "named"),
    [("budgets: 3\n", "'budget_s'"), ("gpus: many\n", "gpus is 'many'"), ("extends: singel\n", "'single'")],
)
def test_a_mistake_in_config_yaml(checkout: Path, data_home: Path, written: str, named: str) -> None:
    path = checkout / "config.yaml"
    text = path.read_text().replace("  tiny:\n", f"  tiny:\n    {written}").replace("    extends: demo\n", "", 1)
    path.write_text(text if "extends" in written else text.replace("  tiny:\n", "  tiny:\n    extends: demo\n"))
    said = refused(checkout, data_home, *RUN, code=2)
    assert "config.yaml" in said and named in said


def test_an_unknown_profile_and_proposer(checkout: Path, data_home: Path) -> None:
    assert "'tiny'" in refused(checkout, data_home, "run", "--profile", "tinny", code=2)
    assert "knobs" in refused(checkout, data_home, *RUN, "--proposer", "oracle", code=2)
    assert "ideas" in refused(checkout, data_home, *RUN, "--proposer", "replay:ideas", code=2)


def test_no_data_and_no_network(checkout: Path, tmp_path: Path) -> None:
    path = checkout / "config.yaml"
    source = next(line for line in path.read_text().splitlines() if line.startswith("    source: local:/"))
    path.write_text(path.read_text().replace(source, "    source: climbmix"))
    said = refused(checkout, tmp_path / "nothing", *RUN, HF_ENDPOINT="http://127.0.0.1:9")
    assert "climbmix" in said and "python" in said.splitlines()[-1]


def test_data_that_changed_since_it_was_prepared(checkout: Path, tiny: Config, data_home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    subprocess.run(["cp", "-r", str(data_home), str(copy)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIGHTSHIFT_DATA", str(copy))
        shard = data.open_dataset(tiny).shards[0]
    with shard.open("r+b") as file:
        file.seek(5000)
        file.write(b"\1\2\3\4")
    assert str(shard) in refused(checkout, copy, *RUN)


def test_a_second_loop_on_the_same_night(checkout: Path, data_home: Path) -> None:
    first = Loop(checkout, data_home, *RUN)
    first.until(lambda: checkouts.state(checkout).running is not None)
    done = subprocess.run(
        [sys.executable, "loop.py", *RUN],
        cwd=checkout,
        env=os.environ | {"NIGHTSHIFT_DATA": str(data_home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and str(first.process.pid) in done.stderr
    status = subprocess.run([sys.executable, "loop.py", "status"], cwd=checkout, capture_output=True, text=True)
    assert f"process {first.process.pid}" in status.stdout
    first.kill()


def test_an_edited_train_py_stops_a_night_before_it_begins(checkout: Path, data_home: Path) -> None:
    edited = (checkout / "train.py").read_text() + "# mine\n"
    (checkout / "train.py").write_text(edited)
    assert "train.py" in refused(checkout, data_home, *RUN)
    assert (checkout / "train.py").read_text() == edited
    assert git(checkout, "branch", "--list", "autoresearch/*") == ""


def test_a_detached_head_begins_a_night_but_does_not_go_on_with_one(begun: Path, data_home: Path) -> None:
    git(begun, "checkout", "-q", "--detach")
    assert "detached" in refused(begun, data_home, "run")
    loop = Loop(begun, data_home, "run", "--profile", "tiny", "--tag", "another")
    loop.until(lambda: checkouts.state(begun, "another").running is not None)
    loop.kill()
    assert git(begun, "symbolic-ref", "--short", "HEAD") == "autoresearch/another"


def test_a_commit_of_somebody_else_on_the_nights_branch(begun: Path, data_home: Path) -> None:
    (begun / "note.md").write_text("mine\n")
    git(begun, "add", "note.md")
    git(begun, "commit", "-qm", "a note of mine")
    tip = git(begun, "rev-parse", "HEAD")
    assert "a note of mine" in refused(begun, data_home, "run")
    assert git(begun, "rev-parse", "HEAD") == tip


def test_a_stale_index_lock(begun: Path, data_home: Path) -> None:
    lock = begun / ".git" / "index.lock"
    lock.touch()
    os.utime(lock, (1e9, 1e9))
    assert "index.lock" in refused(begun, data_home, "run")
    assert lock.exists()


def test_another_device_or_data_is_another_night(begun: Path, data_home: Path) -> None:
    path = begun / "config.yaml"
    path.write_text(path.read_text().replace("budget_steps: 20", "budget_steps: 21"))
    assert "budget_steps was 20, is 21" in refused(begun, data_home, "run")


def test_experiments_that_cannot_be_written(begun: Path, data_home: Path) -> None:
    (begun / "experiments").write_text("in the way\n")
    loop = Loop(begun, data_home, "run")
    loop.until(lambda: len(checkouts.state(begun).rows) > 0)
    loop.process.send_signal(2)
    assert loop.wait(20) == 130, loop.said()
    assert "not published" in loop.said() and "experiments" in loop.said() and "Traceback" not in loop.said()
    assert len(checkouts.state(begun).rows) >= 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes of disk, where the machine lets us mount some."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk to fill: mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_stops_the_night_with_its_ledger_whole(checkout: Path, data_home: Path, small_disk: Path) -> None:
    (checkout / ".nightshift").symlink_to(small_disk)
    loop = Loop(checkout, data_home, *RUN)
    loop.until(lambda: len(checkouts.state(checkout).rows) > 0)
    with (small_disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            pass
    assert loop.wait(60) == 1, loop.said()
    assert "disk" in loop.said() or "space" in loop.said()
    assert "Traceback" not in loop.said(), loop.said()
    rows = len(checkouts.state(checkout).rows)
    (small_disk / "filler").unlink()
    resumed = Loop(checkout, data_home, "run")
    resumed.until(lambda: len(checkouts.state(checkout).rows) > rows)
    resumed.kill()


def test_without_an_identity_nightshift_signs(checkout: Path, data_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    bare = {"HOME": str(home), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    ideas = checkout / "ideas"
    ideas.mkdir()
    (ideas / "001-faster.py").write_text(checkouts.TRAIN.replace("LR = 10.0", "LR = 60.0"))
    code, said = call(checkout, data_home, *RUN, "--proposer", "replay:ideas", **bare)
    assert code == 0, said
    who = git(checkout, "log", "-1", "--format=%an <%ae>", "autoresearch/test~1")
    assert who == "nightshift <nightshift@localhost>"
    assert not list(home.glob(".gitconfig"))


def test_neither_rubbish_in_its_folder_nor_a_missing_brief_ends_a_night(
    tmp_path: Path, tiny: Config, data_home: Path
) -> None:
    root = checkouts.make(tmp_path / "checkout", tiny, max_experiments=2, baselines=1)
    ideas = root / "ideas"
    ideas.mkdir()
    for number, rubbish in enumerate(("os.makedirs('weights.d'); os.chmod('weights.d', 0)", "os.chmod('.', 0)"), 1):
        text = checkouts.TRAIN.replace("    run.finish(model)", f"    run.finish(model)\n    import os; {rubbish}", 1)
        (ideas / f"{number:03d}-rubbish.py").write_text(text)
    (root / "program.md").unlink()
    git(root, "commit", "-qam", "no brief")
    code, said = call(root, data_home, *RUN, "--proposer", "replay:ideas")
    assert code == 0 and "program.md" in said, said
    assert len(checkouts.state(root).rows) == 3
    for folder in (root / ".nightshift" / TAG / "runs").iterdir():
        assert {path.name for path in folder.iterdir()} <= {
            "train.py", "run.log", "server.log", "weights.safetensors", "nats-val.npy"
        }


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-experiments", "-3"),
        ("--max-hours", "nan"),
        ("--max-usd", "-1"),
        ("--tag", "cache"),
        ("--tag", "x" * 300),
    ],
)
def test_a_flag_that_makes_no_sense(checkout: Path, data_home: Path, flags: tuple[str, str]) -> None:
    assert flags[0] in refused(checkout, data_home, "run", "--profile", "tiny", *flags, code=2)
    assert git(checkout, "branch", "--list", "autoresearch/*") == ""


def test_a_dry_run_begins_nothing(checkout: Path, data_home: Path) -> None:
    code, said = call(checkout, data_home, *RUN, "--dry-run")
    assert code == 0 and "nothing was begun" in said, said
    assert checkouts.events(checkout) == [] and git(checkout, "branch", "--list", "autoresearch/*") == ""
