"""What a run costs beside its budget: python bench/startup.py [--profile P --budget 5 --runs 2]

Runs train.py by hand so many times in a fresh copy with empty compiler caches, and each time once more with the caches
that the first left behind; the caches lie where the loop puts them. Seconds, a line a run: from the start of the
process to the first batch (imports, compiling, warming up), training, from the last batch to the score (weights saved,
loaded by a model server, scored), and all that was not training. The first batch is the median over the printed steps
of when a line came less the seconds that it shows, so it is right to some 0.05 s.

The second table is of one more run with `python -X importtime`: what its own process spent on importing, by package,
late imports of the compiler included. The operating system's file cache is left as it is.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path

from machine import head, heading, row
from trainings import Training, checkout, environment, train

from nightshift import devices

IMPORT = re.compile(r"import time: +(\d+) \| +\d+ \| +([\w.]+)")
PACKAGES = ("torch", "triton", "nightshift")


def timed(name: str, run: Training) -> str:
    """A line of the first table."""
    if run.failure:
        return row(name, run.failure, "", "", "")
    training = run.figure("training_seconds")
    seconds = run.first_batch_s, training, run.scored_s - run.first_batch_s - training, run.whole_s - training
    return row(name, *(f"{s:.1f}" for s in seconds))


def import_seconds(errors: str) -> dict[str, float]:
    """Seconds by top-level package, from what -X importtime wrote; a module's are its own, without what it imports."""
    spent: Counter[str] = Counter()  # microseconds
    for microseconds, module in IMPORT.findall(errors):
        package = module.partition(".")[0]
        spent[package if package in PACKAGES else "others"] += int(microseconds)
    return {package: count / 1e6 for package, count in spent.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=devices.default_profile())
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of training")
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    print(heading(), f"profile {args.profile}, budget {args.budget:g} s", "", sep="\n\n", end="")
    print(head("caches", "to the first batch", "training", "last batch to score", "beside training"), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.runs):
            folder = checkout(Path(scratch, str(number)))
            env = environment(args.profile, args.budget, number + 1, folder / ".nightshift/cache")
            for name in ("fresh", "warm"):
                print(timed(f"{name}, run {number + 1}", train(folder, env)), flush=True)
        seconds = import_seconds(train(folder, env, ["-X", "importtime"]).errors)
    print("", head("imported", "s"), sep="\n")
    for package, spent in {**seconds, "all": sum(seconds.values())}.items():
        print(row(package, f"{spent:.1f}"))


if __name__ == "__main__":
    main()
