"""A thousand answers judged over a server that fails three times in ten: `python benchmarks/judge_faults.py`.

The fault server of the tests knows the right verdict of each answer, so a verdict that is wrong, doubled or lost is counted as such.
The same answers are judged without faults first. Prints JSON: verdicts, requests, seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fault_server import FAULTS, differing, labelled, serving

from blockem.judges.server import ServerJudge


def judged(answers: int, share: float, reasks: int, slow: float, concurrency: int) -> dict[str, Any]:
    """Judge `answers` answers with faults in this share of the requests, of every kind alike."""
    prompts, texts, right = labelled(answers)
    dice = random.Random(0)

    def script(_number: int, _content: str) -> str:
        return dice.choice(FAULTS) if dice.random() < share else ""

    with serving(script, slow) as server, tempfile.TemporaryDirectory() as folder:
        judge = ServerJudge(
            "m", server.url, cache=Path(folder) / "verdicts.db", backoff=0.01, timeout=5, reasks=reasks, concurrency=concurrency
        )
        began = time.perf_counter()
        got = judge.judge(prompts, texts)
        seconds = time.perf_counter() - began
        requests = len(server.seen)
        kinds = Counter(fault for fault in server.faults if fault)
        again = judge.judge(prompts, texts)
        return {
            "answers": answers,
            "right": sum(a == b for a, b in zip(got, right, strict=True)),
            "wrong": len(differing(got, right)),
            "missing": sum(one.missing for one in got),
            "requests": requests,
            "faults": dict(sorted(kinds.items())),
            "seconds": round(seconds, 2),
            "asked_again_by_a_rerun": len(server.seen) - requests,
            "rerun_missing": sum(one.missing for one in again),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.3, help="share of requests that fail")
    parser.add_argument("--reasks", type=int, default=6, help="how often an unreadable reply is asked for again")
    parser.add_argument("--slow", type=float, default=0.3, help="seconds of a slow reply")
    parser.add_argument("--concurrency", type=int, default=16)
    options = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    os.environ["NO_PROXY"] = "127.0.0.1"
    found = {
        name: judged(options.answers, share, options.reasks, options.slow, options.concurrency)
        for name, share in (("without faults", 0.0), ("with faults", options.share))
    }
    found["times as long"] = round(found["with faults"]["seconds"] / found["without faults"]["seconds"], 2)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
