"""The face that train.py sees, and the data command that a person runs. Read-only for proposers.

run = prepare.open_run()                     in train.py: the contract is on nightshift.openrun.OpenRun
python prepare.py [--profile P] [--source python|local:DIR|climbmix|fineweb10B]
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nightshift.openrun import OpenRun


def open_run(total_steps: int | None = None) -> OpenRun:
    """Opens this process's training run: one of a night, or one by hand.

    `total_steps` is where a time_to_target run ends, and makes its progress() count steps instead of seconds; a val_bpb
    run ends with its budget, whatever is asked.
    """
    from pathlib import Path

    from nightshift import handover, openrun

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    line: openrun.Line
    if socket := os.environ.get(handover.SOCKET_ENV):
        line = handover.RankEnd(Path(socket), rank)
    else:
        from nightshift.byhand import ByHand

        line = ByHand(rank, world_size)
    return openrun.OpenRun(line, rank, int(os.environ.get("LOCAL_RANK", "0")), total_steps)


def main() -> int:
    """Prepares the data of a profile; says where it lies and what it holds."""
    import argparse
    import sys

    from nightshift import config, devices, preparing
    from nightshift.values import Stop

    parser = argparse.ArgumentParser(prog="prepare.py", description="prepare the data of a profile")
    parser.add_argument("--profile", help="of config.yaml; without it, the one that fits this machine")
    parser.add_argument("--source", help="python, local:DIR, climbmix or fineweb10B, instead of the profile's own")
    args = parser.parse_args()
    try:
        dataset = preparing.prepare(config.load(profile=args.profile or devices.default_profile(), source=args.source))
    except Stop as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    tokens = {name: counts["tokens"] for name, counts in dataset.manifest["counts"].items()}
    held = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in tokens.items())
    print(f"{dataset.root}: tokens {held}; digest {dataset.digest[:16]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
