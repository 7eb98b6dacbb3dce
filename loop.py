"""The night: its main loop, and the command line. `python loop.py run --help` lists what a night takes."""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

from nightshift import config as configuration
from nightshift import data, decide, devices, doctor, proposers, publish, report, runner, sandbox, status, verify
from nightshift.branch import Branch
from nightshift.config import Config
from nightshift.journal import Journal
from nightshift.night import INTERRUPTED, Ledger, Night, Purse, folder_of, lock, make_home
from nightshift.opening import as_before, choose_tag, take_up
from nightshift.scorer import Scorer
from nightshift.values import Reject, Score, Stop
from nightshift.view import View

ROOT = configuration.ROOT


def research(night: Night) -> str:
    """program.md → brief → proposer → commit → train → score → decide → audit → record → advance, until the end."""
    while (task := decide.next(night.state, time.time())).kind != "end":
        run = score = None
        try:
            proposal = night.propose(task)
            if proposal is None:  # journaled, so that what comes next is no candidate
                continue
            candidate = night.commit(task, proposal)
            with night.scorer.serve(candidate.folder / "train.py", candidate.folder) as server:
                run = runner.train(candidate, night.bench, server, night.watch)
                score = Score(server.score(run.weights, task.splits), run.train_s)
            decision = decide.judge(night.state, task, run, score, candidate.net_added)
            decision = night.audited(decision, candidate, run)
        except Reject as reason:
            decision = decide.reject(night.state, reason)
        night.record(decision, run, score)
        night.advance()
        if task.kind == "baseline" and score is None:
            raise Stop(f"the unchanged train.py does not run: {decision.reason}\nMend it, then: python loop.py run")
    return task.why


def run(args: argparse.Namespace) -> int:
    """Opens a night, or goes on with one, and works until it ends or is stopped."""
    make_home(ROOT)
    tag = choose_tag(ROOT, args.tag)
    profile, config, why = chosen(args, tag)
    folder = folder_of(ROOT, tag)
    with View() as view, lock(folder), devices.lease(config.gpus) as lease:
        tier = sandbox.probe()
        if shutil.which(sandbox.LIFELINE[0]) is None:
            raise Stop("setpriv is not to be found, and without it no run ends for sure: install util-linux")
        view.say(f"night {tag}, profile {profile} ({why})")
        view.say(f"device {lease.name}; sandbox {tier}" + (f" ({tier.missing})" if tier.missing else ""))
        book, branch, halt = Ledger(Journal(folder / "journal.jsonl")), Branch(ROOT, tag), threading.Event()
        proposer = proposers.make(config, lease.kind, Purse(book, config.max_usd), view.say, halt)
        dataset = prepared(config, profile)
        runner.fault_in([*dataset.shards, *dataset.doc_starts])
        bench = runner.Bench(config, dataset, lease, tier, ROOT / ".nightshift" / "cache")
        view.say(f"proposer {proposer.name}; {len(book.state.rows)} runs so far; limits: {limits_in_words(config)}")
        if args.dry_run:
            view.say("a dry run: nothing was begun")
            return doctor.doctor(ROOT)
        take_up(ROOT, tag, book, branch, bench)
        with Scorer(config, lease, tier, folder, bench.cache) as scorer:
            return work(Night(ROOT, book, branch, bench, scorer, proposer, halt, view))


def chosen(args: argparse.Namespace, tag: str) -> tuple[str, Config, str]:
    """Profile, config, and why that profile. A night that goes on keeps what it had, unless a flag says otherwise."""
    before = as_before(ROOT, tag)
    if args.profile:
        profile, why = args.profile, "as asked"
    elif before:
        profile, why = before.pop("profile"), "the night goes on under it"
    else:
        profile = devices.default_profile()
        why = "a CUDA device is here" if profile == "single" else "no CUDA device is here"
    before.pop("profile", None)
    flags = {name: getattr(args, name) for name in ("proposer", "max_experiments", "max_hours", "max_usd")}
    given = {name: value for name, value in flags.items() if value is not None}
    return profile, configuration.load(profile=profile, **(before | given)), why


def limits_in_words(config: Config) -> str:
    """What ends the night's search."""
    words = {"max_experiments": "{} experiments", "max_hours": "{:g} hours", "max_usd": "${:g}"}
    told = [form.format(getattr(config, name)) for name, form in words.items() if getattr(config, name) is not None]
    return ", ".join(told) or "none, until it is stopped"


def prepared(config: Config, profile: str) -> data.Dataset:
    """The profile's data, made if there is none (in a process of its own: it takes memory), each file checked."""
    if not (data.folder(config) / "manifest.json").exists():
        made = subprocess.run([sys.executable, str(ROOT / "prepare.py"), "--profile", profile])
        if made.returncode:
            raise SystemExit(made.returncode)
    dataset = data.open_dataset(config)
    data.verify_digests(dataset)
    return dataset


def work(night: Night) -> int:
    """Runs the night's loop under everything that can end it; every end is journaled and published."""
    code, cause = 0, ""
    try:
        night.advance()
        cause = research(night)
        if not night.state.over:
            night.book.write("claim", **decide.claim(night.state, cause))
    except KeyboardInterrupt:
        code, cause = 130, "interrupted"
        night.view.say("interrupted: bringing the ledger up to date; once more stops at once")
        night.book.reread()
    except (Stop, OSError) as stop:
        code, cause = getattr(stop, "code", 1), said(stop)
    night.close()
    try:
        finish(night, code, cause)
    except (Stop, OSError) as stop:
        night.view.close()
        night.view.say(f"{cause}\nnot published: {said(stop)}")
        return code or 1
    return code


def said(stop: Stop | OSError) -> str:
    """What ended the night, in words: a disk that is full or read-only is as good a reason as any."""
    if isinstance(stop, Stop):
        return str(stop)
    return f"{stop.filename or 'a file'}: {stop.strerror}; the journal is whole. Mend that, then: python loop.py run"


def finish(night: Night, code: int, cause: str) -> None:
    """Publishes what there is, journals the stop, and says what it cost and what comes next."""
    state = night.state
    records = publish.write_records(ROOT, night.folder, state, night.branch)
    night.write_results()
    moves_to = ""
    if state.over:
        paths = [records, ROOT / "results.tsv"]
        moves_to = night.branch.publish(paths, f"ledger of night {state.night['tag']}\n", time.time())
    night.book.write("stop", code=code, cause=cause, moves_to=moves_to)
    verdict = state.claim["verdict"] if state.claim else "the night is not over"
    night.view.close()
    night.view.say(f"{cause}\n{len(state.rows)} runs, {len(state.keeps)} keeps, ${state.usd:.2f} spent: {verdict}")
    again = f"python loop.py run --tag {state.night['tag']}"
    night.view.say(f"HEAD is on {night.branch.name}; next: {'python loop.py report' if state.over else again}")


def whole(text: str) -> int:
    """A flag's number, 1 or more."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def positive(text: str) -> float:
    """A flag's number above 0, and finite."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `run` is what is meant where no command is named."""
    commands = ("run", "status", "report", "verify", "doctor")
    if not argv or argv[0] not in (*commands, "-h", "--help"):
        argv = ["run", *argv]
    parser = argparse.ArgumentParser(prog="loop.py", description="an overnight research loop for pretraining",
                                     epilog="what a night takes: python loop.py run --help")
    sub = parser.add_subparsers(dest="command", required=True)
    night = sub.add_parser("run", help="run a night, or go on with one (the default)")
    night.add_argument("--profile", help="of config.yaml; without it, the one that fits this machine")
    night.add_argument("--proposer", help="auto, anthropic, knobs or replay:DIR")
    night.add_argument("--tag", help="the night's name; without it the newest unfinished night, else today's date")
    night.add_argument("--max-experiments", type=whole, help="candidates in the whole night")
    night.add_argument("--max-hours", type=positive, help="from now on")
    night.add_argument("--max-usd", type=positive, help="for the whole night's proposals")
    night.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and stop")
    sub.add_parser("status", help="the night that runs, or the last one")
    sub.add_parser("report", help="report.html and progress.png")
    sub.add_parser("verify", help="rebuild results.tsv from the journals; check chain, commits and diffs")
    sub.add_parser("doctor", help="is this machine ready, and if not, what mends it")
    return parser.parse_args(argv)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C: raised, and noted too, since Python drops what is raised inside a finaliser."""
    INTERRUPTED.set()
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    """Runs one command; returns its exit code: 0 done, 1 could not go on, 2 wrong usage, 130 interrupted."""
    args = parse(argv)
    commands = {"report": report.report, "verify": verify.verify, "doctor": doctor.doctor}
    try:
        if args.command == "run":
            signal.signal(signal.SIGINT, interrupt)  # set here: a background job inherits it ignored
            signal.signal(signal.SIGTERM, interrupt)  # a polite kill is a Ctrl-C
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal may go; the night stays
            return run(args)
        if args.command == "status":
            status.show(ROOT)
            return 0
        return commands[args.command](ROOT)
    except Stop as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("interrupted; the journal is whole, and `python loop.py run` goes on from it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
