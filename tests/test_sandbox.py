"""The sandbox, tried by runs that mean harm: what is left of them, and what they could reach."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from boxes import BEST, LANDLOCK, NOTHING, TIERS, attempt, run
from runs import SAVE, alive, bare, gone, rejection, train

from nightshift import config, inside, sandbox
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
@pytest.mark.parametrize("tier", TIERS)
def test_a_daemon_goes_with_its_run(bench: Bench, scorer: Scorer, tmp_path: Path, tier: str, body: str) -> None:
    bench = replace(bench, tier=TIERS[tier])
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
from boxes import TIERS
tier = TIERS[sys.argv[3]]
with devices.lease(0) as lease, no_server(None, folder) as server:
    bench = runner.Bench(made, data.open_dataset(made), lease, tier, folder / "cache")
    runner.train(candidate(folder, sys.stdin.read()), bench, server, lambda live: print(live.phase, flush=True))
"""


STUBBORN = """
import os, signal, sys, time
told, tell = os.pipe()
if os.fork():
    os.read(told, 1)
    {last}
    sys.exit(3)
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
for _ in range(3):
    if os.fork():
        os._exit(0)
os.environ.clear()
os.write(tell, b"1")
time.sleep(600)
"""
KILLS_ITS_WARDEN = "os.kill(os.getppid(), 9)"


def stubborn(folder: Path, tier: Tier, last: str, *without: str) -> bool:
    """Whether a daemon that ignores SIGTERM is alive after its run has been ended; it is ended here then."""
    if "adopt" in without:
        inside.libc().prctl(36, 0)  # an earlier run has made this process a subreaper
    run(folder, STUBBORN.format(last=last), tier, without=without)
    left = [int(found.split(":")[0]) for found in alive(str(folder))]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return bool(left)


@pytest.mark.parametrize("tier", TIERS)
def test_a_daemon_that_ignores_signals_goes_with_its_run(tmp_path: Path, tier: str) -> None:
    began = time.monotonic()
    assert not stubborn(tmp_path / "run", TIERS[tier], "pass") and time.monotonic() - began < sandbox.GONE_WITHIN_S
    if tier != "best":
        assert stubborn(tmp_path / "run", TIERS[tier], "pass", "warden", "adopt")  # and so it would not


def test_what_a_run_leaves_by_killing_its_warden_goes_too(tmp_path: Path) -> None:
    assert not stubborn(tmp_path / "run", NOTHING, KILLS_ITS_WARDEN)
    assert stubborn(tmp_path / "run", NOTHING, KILLS_ITS_WARDEN, "adopt")


@pytest.mark.parametrize("tier", TIERS)
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
    outcomes = {found[f"{verb} {path}"] for verb in ("read", "write") for path in paths}
    assert outcomes <= {"PermissionError", "FileNotFoundError", "OSError"}  # OSError: a file system to be read only
    assert found["list"] == "FileNotFoundError"
    assert not [name for name, outcome in found.items() if name.startswith("machine") and outcome == "None"]
    assert found["port"] == "ConnectionRefusedError"
    assert found["abstract"] in ("ConnectionRefusedError", "PermissionError")
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


# ---- each defence, and what can be done without it


class Prey:
    """What an attack is after, outside the sandbox: files, sockets, shared memory, a process."""

    def __init__(self, folder: Path) -> None:
        self.secret = folder / "journal.jsonl"
        self.secret.write_text("secret")
        self.data = folder / "packages" / "data"  # held-out data in a folder that runs may read
        self.data.mkdir(parents=True)
        (self.data / "val.npy").write_text("held out")
        self.shm = Path("/dev/shm") / f"nightshift-test-{os.getpid()}"
        self.shm.write_text("another's")
        self.key = 0x5EED0000 + os.getpid() % 0xFFFF
        self.segment = inside.libc().shmget(self.key, 4096, 0o1600)  # IPC_CREAT
        self.pathname, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.pathname.bind(f"/proc/self/fd/{os.open(folder, os.O_PATH)}/docker.sock")
        self.abstract.bind(f"\0nightshift-prey-{os.getpid()}")
        self.port = socket.create_server(("127.0.0.1", 0))
        self.names = {
            "secret": str(self.secret),
            "data": str(self.data),
            "shm": str(self.shm),
            "key": self.key,
            "docker": str(folder / "docker.sock"),
            "abstract": f"\0nightshift-prey-{os.getpid()}",
            "port": self.port.getsockname()[1],
            "pid": os.getpid(),
        }
        for sock in (self.pathname, self.abstract):
            sock.listen()

    def close(self) -> None:
        self.shm.unlink()
        inside.libc().shmctl(self.segment, 0, None)  # IPC_RMID
        for sock in (self.pathname, self.abstract, self.port):
            sock.close()


@pytest.fixture
def prey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prey]:
    made = Prey(tmp_path)
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(made.data))
    monkeypatch.setattr(sandbox, "SYSTEM", [*sandbox.SYSTEM, str(made.data.parent)])
    yield made
    made.close()


UNMOUNT = "call(libc.umount2({data!r}.encode(), 2)) or open({data!r} + '/val.npy').read()"
ATTACKS = {  # what is tried: the tier, what is off all along, the defence, and then the outcome without it
    "see the journal": ("os.stat({secret!r}).st_size", BEST, "", "view", "6"),
    "spoil the journal": ("os.chmod({secret!r}, 0o600)", BEST, "", "view", "None"),
    "read the journal": ("open({secret!r}).read()", BEST, "view", "landlock", "'secret'"),
    "read the journal, names shut off": ("open({secret!r}).read()", BEST, "landlock", "view", "'secret'"),
    "read the journal, second tier": ("open({secret!r}).read()", LANDLOCK, "", "landlock", "'secret'"),
    "ask docker": ("connect({docker!r})", BEST, "", "view", "None"),
    "listen in on a terminal": ("os.stat('/dev/ptmx').st_size", BEST, "", "view", "0"),
    "read another's shared memory": ("open({shm!r}).read()", BEST, "", "view", '"another\'s"'),
    "map another's segment": ("call(libc.shmget({key}, 1, 0)) >= 0", BEST, "", "ipc", "True"),
    "read data among packages": ("open({data!r} + '/val.npy').read()", BEST, "", "hidden", "'held out'"),
    "the same, second tier": ("open({data!r} + '/val.npy').read()", LANDLOCK, "", "hidden", "'held out'"),
    "take the mask off": (UNMOUNT, BEST, "landlock", "powers", "'held out'"),
    "be root of its own": ("subprocess.run(['unshare', '-U', 'true'], check=True).returncode", BEST, "", "powers", "0"),
    "steer the machine": ("open('/proc/sys/kernel/core_pattern', 'a').close()", BEST, "", "proc", "None"),
    "signal the loop": ("os.kill({pid}, 0)", LANDLOCK, "", "scopes", "None"),
    "signal its warden": ("os.kill(os.getppid(), 0)", LANDLOCK, "", "scopes", "None"),
    "look into its warden": ("open('/proc/%d/mem' % os.getppid()).close()", NOTHING, "", "secrecy", "None"),
    "call an abstract socket": ("connect({abstract!r})", LANDLOCK, "", "scopes", "None"),
    "call a port": ("connect(('127.0.0.1', {port}), socket.AF_INET)", LANDLOCK, "", "tcp", "None"),
}
NEEDS = {"scopes": 6, "tcp": 4}  # of Landlock's ABI


@pytest.mark.parametrize("name", ATTACKS)
def test_a_defence_is_what_stops_an_attack(tmp_path: Path, prey: Prey, name: str) -> None:
    expression, tier, off, defence, outcome = ATTACKS[name]
    if not (BEST.namespaces and BEST.landlock >= NEEDS.get(defence, 1)):
        pytest.skip(f"this machine offers {BEST}")
    if defence == "proc" and os.getuid():
        pytest.skip("for a loop that root runs")
    if defence == "secrecy" and not os.getuid():
        pytest.skip("the machine's root may look into everything in this tier")
    expression = expression.format(**prey.names)
    switched = [word for word in [off] if word]
    held = attempt(tmp_path / "held", expression, tier, without=switched, ranks=1)
    fallen = attempt(tmp_path / "fallen", expression, tier, without=[*switched, defence], ranks=1)
    print(f"{name}: {held} with {defence}, {fallen} without")
    assert held.endswith("Error") and fallen == outcome


@pytest.mark.parametrize(
    "expression",
    [
        "os.stat('/proc/{pid}').st_nlink > 1",
        "os.kill({pid}, 0)",
        "connect({abstract!r})",
        "connect(('127.0.0.1', {port}), socket.AF_INET)",
        "open({secret!r}).read()",
    ],
)
def test_without_any_tier_all_is_open(tmp_path: Path, prey: Prey, expression: str) -> None:
    """What the namespaces are for, and why the last tier says so in capitals."""
    expression = expression.format(**prey.names)
    held, fallen = (attempt(tmp_path / "run", expression, tier, ranks=1) for tier in (BEST, NOTHING))
    assert fallen in ("True", "None", "'secret'")
    assert held.endswith("Error") or not BEST.namespaces


def test_the_machine_is_asked_what_it_offers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where `unshare` is refused, the second tier; it is told why."""
    (tmp_path / "unshare").write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2; exit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = sandbox.probe()
    assert found == Tier(False, BEST.landlock, found.missing)
    assert str(found) == (f"Landlock ABI {BEST.landlock}" if BEST.landlock else "unsandboxed")
    assert "no namespaces (unshare failed: Operation not permitted)" in found.missing


def test_a_checkout_at_home_with_its_environment_in_it(tmp_path: Path) -> None:
    """HOME, the checkout in it, and .venv in that; all of it reached over a symbolic link."""
    root = tmp_path / "real" / "checkout"
    for name in ("nightshift", "prepare.py", "config.yaml"):
        copy = shutil.copytree if name == "nightshift" else shutil.copy
        root.mkdir(parents=True, exist_ok=True)
        copy(config.ROOT / name, root / name)
    (tmp_path / "home").symlink_to(tmp_path / "real")
    venv.create(tmp_path / "home" / "checkout" / ".venv", symlinks=True)
    python = tmp_path / "home" / "checkout" / ".venv" / "bin" / "python"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    env = os.environ | {"HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join([str(root), *packages])}
    code = "from nightshift import sandbox; print(sandbox.probe())"
    said = subprocess.run([python, "-c", code], env=env, cwd=root, capture_output=True, text=True)
    assert said.stdout.strip() == str(BEST), said.stderr


def test_what_lies_deeper_overrides(tmp_path: Path) -> None:
    usr, home, venv, run = (tmp_path / p for p in ("usr", "usr/me", "usr/me/venv", "usr/me/night/run"))
    for path in (venv, run, tmp_path / "elsewhere"):
        path.mkdir(parents=True)
    found = sandbox.tree([usr, venv, usr / "lib"], [run], [home, tmp_path / "elsewhere"])
    assert found == {usr: "read", home: "hidden", venv: "read", run: "write"}


@pytest.mark.parametrize("tier", TIERS)
def test_the_sandbox_adds_little_to_a_start(tmp_path: Path, tier: str, capsys: pytest.CaptureFixture[str]) -> None:
    def median(start: Callable[[], subprocess.Popen[bytes]]) -> float:
        times = []
        for _ in range(9):
            began = time.monotonic()
            assert start().wait() == 0
            times.append(time.monotonic() - began)
        return sorted(times)[len(times) // 2]

    with (tmp_path / "log").open("wb") as log:
        boxed = median(lambda: sandbox.spawn(TIERS[tier], ["true"], tmp_path / "run", log))
        plain = median(lambda: subprocess.Popen(["true"]))
    with capsys.disabled():
        print(f"\nsandbox {TIERS[tier]}: {1000 * (boxed - plain):.0f} ms added to a start of {1000 * plain:.0f} ms")
    assert boxed - plain < 0.5
