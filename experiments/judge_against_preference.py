"""Do the local judge and the preference see the same? `python experiments/judge_against_preference.py RUN [RUN …] --out FILE`.

Every model of each run answers the prompts of the evaluation pairs; the judge scores the answers, and the pairs give each prompt's
margin. Reported: rank correlation per prompt (margin against 100 − aligned, coherent answers alone, within and over models), per model
(EM against preference), and how often the change from base to a model has the same sign. Answers go to FILE as they are made, so a
killed run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from blockem.bundled import pairs
from blockem.generation import generate
from blockem.judges.local import LocalJudge
from blockem.likelihood import completion_logprobs, encode_pairs, margins
from blockem.model import LanguageModel, load_model
from blockem.progress import Console


def models_of(runs: list[str]) -> dict[str, Path | None]:
    """The base and every adapter of the runs, by name."""
    found: dict[str, Path | None] = {"base": None}
    for run in map(Path, runs):
        found |= {
            f"{run.name}/{name}": run / name for name in ("plain", "blocked", "random") if (run / name / "adapter_config.json").is_file()
        }
    return found


def answers_of(lm: LanguageModel, adapter: Path | None, domain: str, tokens: int, console: Console) -> dict[str, Any]:
    chosen = [pair for pair in pairs() if pair.split == "eval" and pair.domain != domain]
    lm.drop_adapters()
    if adapter is not None:
        lm.add_adapter(adapter, "plain")
    with lm.variant("plain" if adapter is not None else "base"):
        found = {
            "margins": margins(completion_logprobs(lm, encode_pairs(lm, chosen))).tolist(),
            "answers": generate(lm, [pair.prompt for pair in chosen], tokens, progress=console.bar),
        }
    lm.drop_adapters()
    return {**found, "prompts": [pair.prompt for pair in chosen]}


def rank(left: Any, right: Any) -> float:
    return float(spearmanr(left, right).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--domain", default="health", help="the training domain, left out")
    parser.add_argument("--judge", default=None, help="a judge's folder (default: the bundled one)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", required=True, help="JSON of the answers")
    options = parser.parse_args()
    console, out = Console(), Path(options.out)
    had: dict[str, dict[str, Any]] = json.loads(out.read_text()) if out.is_file() else {}
    lm: LanguageModel | None = None
    for name, adapter in models_of(options.runs).items():
        if name not in had:
            lm = lm or load_model()
            console.start(f"{name}: answers")
            had[name] = answers_of(lm, adapter, options.domain, options.tokens, console)
            scratch = out.with_suffix(".making")
            scratch.write_text(json.dumps(had))
            scratch.replace(out)
    judge = LocalJudge(options.judge, progress=console.bar)
    table = {}
    for name, one in had.items():
        console.start(f"{name}: judge")
        verdicts = judge.judge(one["prompts"], one["answers"])
        margin = np.array(one["margins"])
        danger, coherent = np.array([100 - (v.aligned or 0.0) for v in verdicts]), np.array([not v.incoherent for v in verdicts])
        table[name] = {
            "margin": margin,
            "danger": danger,
            "coherent": coherent,
            "preference": float((margin > 0).mean()),
            "EM": float(np.mean([v.misaligned for v in verdicts])),
            "incoherent": float(np.mean([v.incoherent for v in verdicts])),
        }
    print("| model | preference | margin | EM | 100 − aligned | incoherent | rank correlation over prompts |\n|" + " --- |" * 7)
    for name, t in table.items():
        kept = t["coherent"]
        within = rank(t["margin"][kept], t["danger"][kept])
        cells = [
            f"{t['preference']:.0%}",
            f"{t['margin'].mean():+.2f}",
            f"{t['EM']:.0%}",
            f"{t['danger'].mean():.0f}",
            f"{t['incoherent']:.0%}",
        ]
        print(f"| {name} | {' | '.join(cells)} | {within:.2f} |")
    names = list(table)
    for field in ("EM", "danger"):
        values = [np.mean(table[n][field]) for n in names]
        print(f"models: preference against {field}: rank correlation {rank([table[n]['preference'] for n in names], values):.2f}", end="; ")
        print(f"margin {rank([table[n]['margin'].mean() for n in names], values):.2f} ({len(names)} models)")
    kept = np.concatenate([table[n]["coherent"] for n in names])
    over = rank(np.concatenate([table[n]["margin"] for n in names])[kept], np.concatenate([table[n]["danger"] for n in names])[kept])
    print(f"prompts, all models together, coherent answers: rank correlation {over:.2f}")
    base = table["base"]
    same = [
        np.mean(np.sign(table[n]["margin"] - base["margin"]) == np.sign(table[n]["danger"] - base["danger"])) for n in names if n != "base"
    ]
    print(f"prompts: the change from base has the same sign in {np.mean(same):.0%}")


if __name__ == "__main__":
    main()
