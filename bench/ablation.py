"""Each technique of train.py on and off: python bench/ablation.py [--profile P --budget 50 --seeds 1,2 --only a,b]

Each variant is train.py with some of its constants replaced, run by hand under each seed, one process a GPU, on all of
the machine's GPUs at once (--gpus 4: on the first four). A row is printed as each run ends; then a table, best mean
score first: the mean validation bits per byte and the standard deviation over the seeds, the difference of the means to
`unchanged` (positive: the technique as it stands helps), steps, tokens and parameters, all means. Failures are rows
too; so are runs for which no time was left of --limit. Compiling and scoring are not in the budget.

    python bench/ablation.py --list    prints the variants
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue

from machine import ROOT, head, heading, row
from trainings import Training, checkout, environment, train

from nightshift import devices

BESIDE_S = 60.0  # what a run may take beside its budget, where --limit says how long all may take
NAN = float("nan")
UNCHANGED = "unchanged"
VARIANTS: dict[str, dict[str, str]] = {
    UNCHANGED: {},
    "n-grams off, their time spent": {"NGRAM_LR": "0.0"},
    "n-grams of 2 alone": {"NGRAMS": "(2,)"},
    "n-gram tables of 2**18": {"GPU_NGRAM_ROWS": "2**18"},
    "batch 2**16": {"GPU_BATCH_TOKENS": "2**16"},
    "batch 2**18": {"GPU_BATCH_TOKENS": "2**18"},
    "depth 8": {"GPU_DEPTH": "8"},
    "depth 10": {"GPU_DEPTH": "10"},
    "no sliding windows": {"GPU_WINDOWS": '"L"'},
    "short window 128": {"GPU_SHORT_WINDOW": "128"},
    "short window 512": {"GPU_SHORT_WINDOW": "512"},
    "rows of 1024": {"GPU_SEQ_LEN": "1024", "GPU_ROWS": "128"},
    "warm-down 0.5": {"WARMDOWN": "0.5"},
    "warm-down 1": {"WARMDOWN": "1.0"},
    "final learning rate 0": {"FINAL_LR": "0.0"},
    "x0 from 0": {"X0_INIT": "0.0"},
    "soft cap 30": {"SOFTCAP": "30.0"},
    "value embeddings without decay": {"VALUE_WEIGHT_DECAY": "0.0"},
    "matrices without decay": {"WEIGHT_DECAY": "0.0"},
    "matrix rate 0.03": {"GPU_MATRIX_LR": "0.03"},
    "matrix rate 0.05": {"GPU_MATRIX_LR": "0.05"},
    "Muon momentum 0.9": {"MUON_MOMENTUM": "0.9"},
    "Muon momentum without warm-up": {"MUON_MOMENTUM_START": "0.95"},
    "rope base 10000": {"GPU_ROPE_BASE": "10_000.0"},
}
Job = tuple[str, int]  # variant, seed


def changed(text: str, constants: dict[str, str]) -> str:
    """train.py with these constants; LookupError names the one that it does not have, or that is so already."""
    for name, value in constants.items():
        pattern = rf"(?m)^({name}(?:: [^=\n]+)? = )([^#\n]*?)(\s*(?:#.*)?)$"
        found = re.findall(pattern, text)
        if len(found) != 1:
            raise LookupError(f"train.py has {len(found)} lines of the form `{name} = ...`; an ablation needs one")
        if found[0][1] == value:
            raise LookupError(f"{name} is {value} in train.py already")
        text = re.sub(pattern, rf"\g<1>{value}\g<3>", text)
    return text


class Ablation:
    """The runs of all variants over the machine's GPUs; each of these has a checkout of its own."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch, self.began = args, scratch, time.monotonic()
        self.free: Queue[int] = Queue()  # GPUs
        for gpu in range(args.gpus):
            checkout(scratch / str(gpu))
            self.free.put(gpu)

    def run(self, job: Job, train_py: str) -> Training:
        """Waits for a GPU, trains on it."""
        args, (_, seed), gpu = self.args, job, self.free.get()
        try:
            if time.monotonic() - self.began + args.budget + BESIDE_S > args.limit:
                return Training([], {}, NAN, NAN, "", "no time was left")
            folder = self.scratch / str(gpu)
            (folder / "train.py").write_text(train_py)
            env = environment(args.profile, args.budget, seed, self.scratch / "cache", [gpu])
            return train(folder, env, limit_s=args.limit - (time.monotonic() - self.began))
        finally:
            self.free.put(gpu)


def run_row(job: Job, run: Training) -> str:
    name, seed = job
    if run.failure:
        return row(name, seed, run.failure, *[""] * 6)
    figures = [f"{run.figure('num_steps'):.0f}", f"{run.figure('total_tokens_M'):.1f}"]
    figures += [f"{run.figure('num_params_M'):.1f}", f"{run.figure('mfu_percent'):.1f}%"]
    figures += [f"{run.figure('peak_vram_mb') / 1024:.1f}", f"{run.whole_s - run.figure('training_seconds'):.0f}"]
    return row(name, seed, f"{run.figure('val_bpb'):.4f}", *figures)


def summary(done: dict[Job, Training]) -> list[str]:
    """The second table's rows, best mean first, variants without any score last."""
    by_name: dict[str, list[Training]] = {}
    for (name, _), run in done.items():
        by_name.setdefault(name, []).append(run)
    means = {name: mean(runs, "val_bpb") for name, runs in by_name.items()}
    rows = []
    for name in sorted(by_name, key=lambda n: (math.isnan(means[n]), means[n])):
        scores = [run.figure("val_bpb") for run in by_name[name] if not run.failure]
        spread = statistics.stdev(scores) if len(scores) > 1 else NAN
        compared = (
            shown(means[name], ".4f"),
            shown(spread, ".4f"),
            shown(means[name] - means.get(UNCHANGED, NAN), "+.4f"),
        )
        counts = [shown(mean(by_name[name], f), ".1f") for f in ("num_steps", "total_tokens_M", "num_params_M")]
        rows.append(row(name, *compared, f"{len(scores)} of {len(by_name[name])}", *counts))
    return rows


def shown(value: float, form: str) -> str:
    return "—" if math.isnan(value) else format(value, form)


def mean(runs: list[Training], figure: str) -> float:
    """Over the runs that were scored."""
    values = [run.figure(figure) for run in runs if not run.failure]
    return statistics.fmean(values) if values else NAN


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=devices.default_profile())
    parser.add_argument("--budget", type=float, default=50.0, help="seconds of training, a run")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(VARIANTS), help="names of variants")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds that all may take")
    parser.add_argument("--gpus", type=int, default=max(1, len(devices.gpu_names())), help="how many to use")
    parser.add_argument("--list", action="store_true", help="print the variants, run nothing")
    args = parser.parse_args()
    if unknown := set(args.only) - set(VARIANTS):
        parser.error(f"no variant {', '.join(sorted(unknown))}: --list prints them")
    return args


def main() -> None:
    args = arguments()
    text = (ROOT / "train.py").read_text()
    texts = {name: changed(text, constants) for name, constants in VARIANTS.items()}
    if args.list:
        print(*(f"{name}: {constants}" for name, constants in VARIANTS.items()), sep="\n")
        return
    conditions = f"profile {args.profile}, budget {args.budget:g} s, one GPU a run"
    print(heading(args.gpus), conditions, "", sep="\n\n", end="")
    print(head("run", "seed", "val_bpb", "steps", "tokens M", "params M", "MFU", "GB", "s beside"), flush=True)
    done: dict[Job, Training] = {}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.gpus) as pool:
        ablation = Ablation(args, Path(scratch))
        jobs = [(name, seed) for seed in args.seeds for name in args.only]
        futures: dict[Future[Training], Job] = {pool.submit(ablation.run, job, texts[job[0]]): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                done[job] = future.result()
                print(run_row(job, done[job]), flush=True)
        except KeyboardInterrupt:  # it has reached the runs too
            pool.shutdown(wait=True, cancel_futures=True)
    columns = "val_bpb, mean", "σ over seeds", "to unchanged", "seeds", "steps", "tokens M", "params M"
    print("", head("variant", *columns), *summary(done), sep="\n")


if __name__ == "__main__":
    main()
