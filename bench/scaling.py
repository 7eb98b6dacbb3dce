"""One run of train.py on 1, 2, 4, 8 GPUs: python bench/scaling.py [--profile P --budget 50 --gpus 1,2,4]

`torchrun --standalone --nproc_per_node=N train.py`, one after the other, seed 1. The batch of a step is the same on any
number of GPUs. A line a number of GPUs: tokens a second on the clock, the same against the first line, the share of the
GPUs' peak rate, the training loss at equal steps (mean of the ten steps up to that one, rank 0's rows), steps, and the
score. Compiler caches are shared: the first line's start is the slowest, which is not on the clock.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from machine import head, heading, row
from trainings import Training, checkout, environment, train

from nightshift import config, devices

STEPS = (50, 100, 200)


def tokens_a_second(run: Training) -> float:
    return run.figure("total_tokens_M") * 1e6 / run.figure("training_seconds")


def measured(gpus: int, run: Training, first: Training, reported_for: int) -> str:
    """A line of the table. train.py reckons its MFU for the profile's number of GPUs, so that is set right here."""
    if run.failure:
        return row(gpus, run.failure, *[""] * (4 + len(STEPS)))
    rate, mfu = tokens_a_second(run), run.figure("mfu_percent") * max(1, reported_for) / gpus
    speed = [f"{rate:,.0f}", f"{rate / tokens_a_second(first):.2f}", f"{mfu:.1f}%"]
    return row(gpus, *speed, *map(run.loss_at, STEPS), f"{run.figure('num_steps'):.0f}", f"{run.figure('val_bpb'):.4f}")


def main() -> None:
    there = len(devices.gpu_names())
    counts = [n for n in (1, 2, 4, 8) if n <= max(1, there)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=devices.default_profile())
    parser.add_argument("--budget", type=float, default=50.0, help="seconds of training")
    parser.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], default=counts)
    args = parser.parse_args()
    print(heading(), f"profile {args.profile}, budget {args.budget:g} s, seed 1", "", sep="\n\n", end="")
    losses = [f"loss at {step}" for step in STEPS]
    print(head("GPUs", "tokens/s", "ratio", "MFU", *losses, "steps", "val_bpb"), flush=True)
    runs: list[Training] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkout(Path(scratch, "checkout"))
        env = environment(args.profile, args.budget, 1, folder / ".nightshift/cache")
        for gpus in args.gpus:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
            runs.append(train(folder, env, launcher))
            print(measured(gpus, runs[-1], runs[0], config.load(profile=args.profile).gpus), flush=True)


if __name__ == "__main__":
    main()
