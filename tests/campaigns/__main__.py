"""Campaigns against the promises of docs/reliability.md; they take minutes to hours and are no part of `make test`.

    python -m tests.campaigns kill --minutes 30        (also: fault, input, soak; secrets searches what they have left)

Ends with the counts and the findings; exit code 1 where there are any. Needs the environment of the tests.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
NAMES = ("kill", "fault", "input", "soak", "secrets")


def main() -> int:
    """Run one campaign. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long it goes on (default: 10)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of its dice (default: another each time)")
    parser.add_argument("--folder", type=Path, default=Path("campaigns"), help="where it works (default: ./campaigns)")
    parser.add_argument("--only", default="", help="what it tries, by a regular expression for its name")
    parser.add_argument(
        "--count", type=int, help="end after so many kills, faults or inputs (default: when time is over)"
    )
    options = parser.parse_args()
    from . import fault, inputs, kill, soak
    from .stage import Stage, shown_keys

    stage = Stage(options.folder.resolve(), options.minutes, options.seed)
    campaigns: dict[str, Callable[..., None]] = {
        "kill": partial(kill.campaign, kills=options.count),
        "fault": partial(fault.campaign, faults=options.count),
        "input": partial(inputs.campaign, inputs=options.count),
        "soak": soak.campaign,
    }
    try:
        if options.name != "secrets":
            campaigns[options.name](stage, only=options.only)
        for shown in shown_keys(stage.folder):
            stage.fails(f"secrets: {shown}")
    finally:  # what was counted so far, also after an error of the campaign itself
        print(f"{options.name}: {stage.report()}", flush=True)
    return 1 if stage.findings else 0


if __name__ == "__main__":
    sys.exit(main())
