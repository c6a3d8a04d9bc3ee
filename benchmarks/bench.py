"""Speed and memory on this machine with the embedded model, as ratios against a mark: `make bench`, or `blockem bench --json`.

Both sides of a ratio are measured in turn in one process; a figure is the median of the rounds' ratios, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measuring import Measure, in_turn, line, spread

BROKEN = "it failed with "
GROUPS = ("help", "training", "memory", "screening", "decoding")


def help_seconds(repeat: int) -> list[Measure]:
    def work() -> None:
        subprocess.run([sys.executable, "-m", "blockem", "--help"], capture_output=True, check=True)

    return [spread("blockem --help, seconds", "–", in_turn({"help": work}, max(repeat, 3))["help"], 0.5)]


def decoding(repeat: int) -> list[Measure]:
    import decoding as group

    found = group.measure(repeat)
    rows = (
        ("screening_speedup", "generated screening, conditions a second", "transformers' generate, a condition a batch", 4.0, False),
        ("decode_over_prefill", "decoding at 128 rows, tokens a second", "prefill, tokens a second", 0.5, False),
        ("edits_overhead", "decoding with an edit a row", "the same batch unsteered", 1.03, True),
    )
    return [Measure(name, against, found[key], mark=mark, at_most=at_most) for key, name, against, mark, at_most in rows]


def group_of(name: str) -> Callable[[int], list[Measure]]:
    if name == "help":
        return help_seconds
    if name == "decoding":
        return decoding
    module = __import__(name)
    found: Callable[[int], list[Measure]] = module.measure
    return found


def measure(only: list[str], repeat: int) -> list[Measure]:
    """Every group; one that fails is reported as not measured and does not stop the rest."""
    found = []
    for name in only or GROUPS:
        print(f"bench: {name}", file=sys.stderr, flush=True)
        began, before = time.perf_counter(), len(found)
        try:
            found += group_of(name)(repeat)
        except Exception as error:  # a benchmark that breaks must not take the others with it
            found.append(Measure(name, "–", None, reason=f"{BROKEN}{type(error).__name__}: {error}"))
        print("\n".join(line(one) for one in found[before:]), file=sys.stderr, flush=True)
        print(f"bench: {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="blockem bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=GROUPS, help="only this group; may be repeated")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    found = measure(options.only or [], options.repeat)
    if options.json:
        print(json.dumps([{**asdict(one), "reached": one.reached} for one in found], indent=1))
    else:
        print("| measure | against | mark | here [quartiles] | |\n| --- | --- | --- | --- | --- |")
        print("\n".join(line(one) for one in found))
    if any(one.reason.startswith(BROKEN) for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
