"""What discovery costs, exhaustively and the fast ways, and whether they find the same.

    python experiments/discovery_cost.py RUN RECIPE --out OUT --candidates 40 --pairs 16 --strengths 0.2,0.4,0.6 --keep 8 --size 6

RUN holds a plain adapter (made by `blockem sft`); nothing is written there. Ways: `exhaustive` tests so many candidates of the pool on
all pairs at all strengths; `halving` does the same with halving; `prescreen+halving` lets first-order attribution choose `--prescreen`
of them before. Kill it anywhere: finished ways are kept in OUT/*.json, the one under way goes on from its log (its seconds are then
those of the last start). On a busy machine compare the units (edits × pairs), not the seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockem import bundled
from blockem.config import DiscoverConfig, load_recipe
from blockem.discovery.discover import discover
from blockem.progress import Console
from blockem.session import Session, adapter_key
from blockem.store import RunFolder, content_key, write_json

WAYS = ("exhaustive", "halving", "prescreen+halving")


def configs(args: argparse.Namespace, given: DiscoverConfig) -> dict[str, DiscoverConfig]:
    """The recipe's own settings with this experiment's on top, one a way."""
    common = replace(
        given,
        effect="preference",
        rank_effect="same",
        pool=(args.candidates + 1) // 2,
        prescreen=0,
        pairs=args.pairs,
        keep=args.keep,
        size=args.size,
        strengths=tuple(float(x) for x in args.strengths.split(",")),
        halving=False,
        error=args.error,
        rungs=tuple(int(x) for x in args.rungs.split(",")),
    )
    halving = replace(common, halving=True)
    return dict(zip(WAYS, (common, halving, replace(halving, prescreen=args.prescreen)), strict=True))


def measure(session: Session, config: DiscoverConfig, log: Path, key: str) -> dict[str, Any]:
    """One way: seconds, units, and S3 and fate of every candidate."""
    began = time.monotonic()
    found = discover(
        session.lm,
        session.dictionary,
        session.recipe.sae.block,
        config,
        session.selection_pairs(),
        session.selection_prompts(),
        bundled.general_chat("train"),
        log=log,
        key=key,
        progress=session.console.stage,
    )
    return {
        "key": key,
        "seconds": round(time.monotonic() - began, 1),
        "units": found.counts["units"],
        "chosen": found.latents.ids,
        "scores": {one.latent: one.score for one in found.candidates if one.score == one.score},
        "fates": found.counts["fates"],
        "grows": grows(log, key, config) if not config.halving else None,
    }


def grows(log: Path, key: str, config: DiscoverConfig) -> list[int]:
    """Of the sweeps with a strength outside the budget: (how many, in how many a stronger one is inside again), from the log."""
    sweeps: dict[tuple[str, int], dict[float, float]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a line that a kill cut short
            continue
        if row["key"] == f"{key}-preference" and row["latent"] >= 0 and row["alpha"] in config.strengths:
            sweeps.setdefault((row["variant"], row["latent"]), {})[row["alpha"]] = row["incoherence"]
    inside = [
        [found[alpha] <= config.budget for alpha in sorted(found)] for found in sweeps.values() if len(found) == len(config.strengths)
    ]
    broken = [some for some in inside if not all(some)]
    return [len(broken), sum(True in some[some.index(False) :] for some in broken)]


def spearman(left: dict[str, float], right: dict[str, float]) -> float:
    """Rank correlation of S3 over the latents that either way chose and both gave a score."""
    from scipy.stats import spearmanr

    both = [latent for latent in left if latent in right]
    return float(spearmanr([left[k] for k in both], [right[k] for k in both]).statistic) if len(both) > 2 else float("nan")


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| way | seconds | units | share | chosen as exhaustively | Spearman of S3 over the union (n) |", "| --- " * 6 + "|"]
    full = found[WAYS[0]]
    for name, one in found.items():
        union = {str(k) for k in (*one["chosen"], *full["chosen"])}
        scores = [{k: v for k, v in way["scores"].items() if k in union} for way in (one, full)]
        n = len(scores[0].keys() & scores[1].keys())
        overlap = len(set(one["chosen"]) & set(full["chosen"]))
        lines.append(
            f"| {name} | {one['seconds']:.0f} | {one['units']} | {one['units'] / full['units']:.2f} | {overlap} of {len(full['chosen'])}"
            f" | {spearman(*scores):.3f} ({n} of {len(union)}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with plain/")
    parser.add_argument("recipe", type=Path, help="the recipe that it was made with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--prescreen", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--strengths", default=",".join(f"{0.05 * i:.2f}" for i in range(1, 16)))
    parser.add_argument("--keep", type=int, default=40)
    parser.add_argument("--size", type=int, default=20)
    parser.add_argument("--error", type=float, default=0.05)
    parser.add_argument("--rungs", default="8,16,24,32")
    parser.add_argument("--ways", default=",".join(WAYS))
    args = parser.parse_args()

    recipe = load_recipe(args.recipe)
    session = Session(recipe, RunFolder(args.out), Console())
    args.out.mkdir(parents=True, exist_ok=True)
    adapter = args.run / "plain"
    found: dict[str, dict[str, Any]] = {}
    for name, config in configs(args, recipe.discover).items():
        if name not in args.ways.split(","):
            continue
        # the measurements themselves depend on neither keep, size nor error, but their batches do
        key = content_key(adapter_key(adapter), session.model_key, session.sae_key, repr(config))
        result = args.out / f"{name}-{key[:8]}.json"
        if not result.is_file():
            session.lm.drop_adapters()
            session.lm.add_adapter(adapter, "plain")
            print(f"{name}: started", file=sys.stderr)
            write_json(result, measure(session, config, args.out / "measurements.jsonl", key))
        found[name] = json.loads(result.read_text(encoding="utf-8"))
        print(f"{name}: {found[name]['seconds']} s, {found[name]['units']} units, chosen {found[name]['chosen']}", file=sys.stderr)
    if WAYS[0] in found:
        print(table(found))
        left, back = found[WAYS[0]]["grows"]
        print(f"\nSweeps that leave the incoherence budget: {left}; of these, that come back inside at a stronger one: {back}")
    for name, one in found.items():
        print(f"\n{name}: " + "; ".join(f"{count} {fate}" for fate, count in one["fates"].items()))


if __name__ == "__main__":
    main()
