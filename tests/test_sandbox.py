"""The sandbox, tried by runs that mean harm: what is left of them, and what they could reach."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from runs import SAVE, alive, bare, gone, rejection, train

from nightshift import config
from nightshift.runner import Bench
from nightshift.sandbox import Tier
from nightshift.scorer import Scorer

# ---- what is left of a run

DAEMON = """
if not os.fork():
    os.setsid()
    if not os.fork():
        os.execvp("sleep", ["sleep", "1234.5"])
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(
    "body", ["line.log(0, float('nan'), 0); time.sleep(60)", "sys.exit(1)", f"line.begin(); finish(); {SAVE}"]
)
@pytest.mark.parametrize("tier", ["best", "no namespaces", "nothing"])
def test_a_daemon_goes_with_its_run(bench: Bench, scorer: Scorer, tmp_path: Path, tier: str, body: str) -> None:
    tiers = {"best": bench.tier, "no namespaces": Tier(False, bench.tier.landlock), "nothing": Tier(False, 0)}
    bench = replace(bench, tier=tiers[tier])
    text = bare(f"{DAEMON}\nPath('daemon').touch()\n{body}")
    if SAVE in body:
        assert train(bench, scorer, tmp_path, text).train_s < 1
    else:
        rejection(bench, scorer, tmp_path, text)
    assert (tmp_path / "daemon").exists() and alive(str(tmp_path)) == []


LOOP = """
import json, sys
from pathlib import Path
from runs import candidate, no_server
from nightshift import config, data, devices, runner, sandbox
folder = Path(sys.argv[1])
made = config.Config(**json.loads(sys.argv[2]))
tier = sandbox.probe() if sys.argv[3] == "best" else sandbox.Tier(False, 0)
with devices.lease(0) as lease, no_server(None, folder) as server:
    bench = runner.Bench(made, data.open_dataset(made), lease, tier, folder / "cache")
    runner.train(candidate(folder, sys.stdin.read()), bench, server, lambda live: print(live.phase, flush=True))
"""


@pytest.mark.parametrize("tier", ["best", "nothing"])
def test_nothing_outlives_a_loop_that_is_killed(bench: Bench, tmp_path: Path, tier: str) -> None:
    settings = json.dumps(asdict(replace(bench.config, budget_s=60.0)))
    env = os.environ | {"PYTHONPATH": f"{config.ROOT}:{Path(__file__).parent}"}
    argv = [sys.executable, "-c", LOOP, str(tmp_path), settings, tier]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, env=env, stdin=pipe, stdout=pipe, text=True) as loop:
        assert loop.stdin and loop.stdout
        loop.stdin.write(bare(f"subprocess.Popen(['sleep', '1234'])\n{DAEMON}\nline.begin()\ntime.sleep(60)"))
        loop.stdin.close()
        while loop.stdout.readline() != "training\n":
            assert loop.poll() is None
        assert len(alive(str(tmp_path))) >= 4
        loop.send_signal(signal.SIGKILL)
    assert gone(str(tmp_path), within_s=5)


# ---- what a run could reach

SPY = """
found = {}
def tries(name, action):
    try:
        found[name] = repr(action())
    except Exception as error:
        found[name] = type(error).__name__
def connect(where, family=socket.AF_INET):
    with socket.socket(family) as sock:
        sock.settimeout(2)
        sock.connect(where)
_, (clock, shard, starts, *_) = line.begin()
for path in json.loads(os.environ["LC_SPY"]):
    tries("read " + path, lambda: open(path, "rb").read(1))
    tries("write " + path, lambda: open(path, "ab").close())
tries("list", lambda: os.listdir(os.path.dirname(os.readlink(f"/proc/self/fd/{shard}"))))
tries("port", lambda: connect(("127.0.0.1", int(os.environ["LC_PORT"]))))
tries("abstract", lambda: connect("\\0nightshift-spy", socket.AF_UNIX))
tries("fd read", lambda: struct.unpack("<i", os.pread(shard, 4, 0))[0])
tries("fd write", lambda: os.pwrite(shard, b"x", 0))
tries("fd reopened", lambda: os.open(f"/proc/self/fd/{shard}", os.O_RDWR))
tries("fd reopened to read", lambda: os.open(f"/proc/self/fd/{shard}", os.O_RDONLY))
tries("fd truncated", lambda: os.truncate(f"/proc/self/fd/{shard}", 0))
tries("kill", lambda: os.kill(int(os.environ["LC_PID"]), 0))
tries("mount", lambda: subprocess.run(["mount", "-t", "tmpfs", "none", "home"], check=True, capture_output=True))
for name in ("sysrq-trigger", "sys/kernel/core_pattern", "sys/kernel/hostname"):
    tries("machine " + name, lambda: open("/proc/" + name, "w").close())
found["environment"] = sorted(os.environ)
found["processes"] = [int(name) for name in os.listdir("/proc") if name.isdigit()]
Path("found.json").write_text(json.dumps(found))
finish(); weights.write_bytes(bytes(8)); line.saved(); time.sleep(60)
"""


def test_a_run_reaches_neither_data_nor_journal_nor_keys_nor_network(
    bench: Bench, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (bench.tier.namespaces and bench.tier.landlock):
        pytest.skip(f"this machine offers {bench.tier}")
    root, folder = bench.dataset.root, tmp_path / "night" / "runs" / "001"
    key = tmp_path / "home" / ".ssh" / "id_ed25519"
    journal = tmp_path / "night" / "journal.jsonl"
    other = tmp_path / "night" / "runs" / "000" / "nats-val.npy"
    for path in (key, journal, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret")
    names = ["val.npy", "test.npy", "manifest.json", bench.dataset.shards[0].name, bench.dataset.doc_starts[0].name]
    checkout = [str(config.ROOT / name) for name in (".git/HEAD", "loop.py", "tests/runs.py")]
    paths = [*(str(root / name) for name in names), *map(str, (key, journal, other)), "../../journal.jsonl", *checkout]
    for name in ("ANTHROPIC_API_KEY", "HF_TOKEN", "NVIDIA_API_KEY", "NCCL_SECRET", "NIGHTSHIFT_DATA"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LC_SPY", json.dumps(paths))  # a name that is passed on
    monkeypatch.setenv("LC_PID", str(os.getpid()))
    before = {path: path.read_bytes() for path in root.iterdir()}
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0nightshift-spy")
        abstract.listen()
        monkeypatch.setenv("LC_PORT", str(port.getsockname()[1]))
        train(bench, scorer, folder, bare(SPY))
    found = json.loads((folder / "found.json").read_text())
    assert {found[f"{verb} {path}"] for verb in ("read", "write") for path in paths} == {"PermissionError"}
    assert found["list"] == "PermissionError"
    assert not [name for name, outcome in found.items() if name.startswith("machine") and outcome == "None"]
    assert found["port"] == found["abstract"] == "ConnectionRefusedError"
    assert found["fd read"] == "20240520" and found["fd write"] == "OSError"
    for how in ("reopened", "reopened to read", "truncated"):
        assert found[f"fd {how}"] == "PermissionError"
    assert found["kill"] == "ProcessLookupError" and found["mount"] == "CalledProcessError"
    assert not {"ANTHROPIC_API_KEY", "HF_TOKEN", "NVIDIA_API_KEY", "NCCL_SECRET", "NIGHTSHIFT_DATA"} & set(
        found["environment"]
    )
    assert os.getpid() not in found["processes"] and 1 in found["processes"]
    assert {path: path.read_bytes() for path in root.iterdir()} == before and journal.read_text() == "secret"


def test_a_log_that_is_made_a_link_is_not_read(bench: Bench, scorer: Scorer, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the person's own")
    for what in (f"os.symlink({str(secret)!r}, 'run.log')", "os.mkfifo('run.log')", "os.mkdir('run.log')"):
        folder = tmp_path / str(abs(hash(what)))
        _, why, seconds = rejection(bench, scorer, folder, bare(f"os.unlink('run.log')\n{what}\nsys.exit(1)"))
        assert why == "train.py ended before run.finish(), exit status 1" and seconds < 3
