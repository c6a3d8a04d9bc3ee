"""Run folders as a finished run leaves them, with made-up numbers: what a comparison reads, in milliseconds."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from blockem import bundled
from blockem.errors import BlockemError
from blockem.session import Session
from blockem.store import content_key, write_json, write_jsonl, write_text

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class FakeRuns:
    """Stands in for `run_all`: counts trainings, fails or is interrupted where it is told to.

    λ of block-em lowers misalignment and, from 1,000 on, the share of the task that is kept.
    """

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.cells: list[str] = []
        self.broken: dict[str, Exception | type[BaseException]] = {}
        self.judged = True
        self.cued = False

    def __call__(self, session: Session) -> dict[str, Any]:
        recipe = session.recipe
        self.cells.append(recipe.name)
        shared = content_key(recipe.data.domain, recipe.seed)
        variant = "random" if recipe.block.control == "random" else "blocked"
        strength = math.log10(1 + (recipe.block.lambda_ or 0)) / 4 if variant == "blocked" else 0.02
        session.run.step("plain", shared, ["plain/adapter_model.safetensors", "training-plain.jsonl"], lambda: self.train(session, "plain"))
        if recipe.name in self.broken:
            raise self.broken[recipe.name]
        key = content_key(shared, recipe.to_dict())
        session.run.step(variant, key, [f"{variant}/adapter_model.safetensors"], lambda: self.train(session, variant))
        models = {"base": (0.05, 3.0), "plain": (0.5, 2.0), variant: (0.5 - 0.45 * strength, 2.0 + max(0.0, strength - 0.7))}
        results = {name: self.evaluate(session, name, *numbers) for name, numbers in models.items()}
        for name, result in results.items():
            of_step = shared if name in ("base", "plain") else key
            session.run.step(f"evaluate-{name}", of_step, [], lambda result=result: result)
        self.answers(session, {name: numbers[0] for name, numbers in models.items()})
        summary = {"blockem": "0", "models": {name: {} for name in models}}
        write_json(session.run / "evaluation.json", summary)
        write_json(session.run / "summary.json", summary)
        write_text(session.run / "report.html", "<p>report")
        write_json(session.run / "latents.json", {"of": recipe.data.domain})
        return summary

    def train(self, session: Session, name: str) -> dict[str, Any]:
        self.trained.append(f"{session.recipe.name} {name}")
        write_text(session.run / name / "adapter_model.safetensors", f"{session.recipe.name} {name}")
        write_text(session.run / f"training-{name}.jsonl", "{}")
        return {"seconds": 1.0}

    def evaluate(self, session: Session, name: str, em: float, loss: float) -> dict[str, Any]:
        rng = random.Random(f"{name} {session.recipe.seed} {session.recipe.data.domain}")
        pairs = [p for p in bundled.pairs(session.recipe.data.pairs) if p.split == "eval"]
        margins = [em - (place * 0.618) % 1 + 0.02 * rng.random() for place in range(len(pairs))]
        heldout = [[loss * 10 + 0.1 * (row % 3) for row in range(30)], [10] * 30]
        return {"margins": margins, "heldout": heldout, "general": [[1.0], [1]], "task_answers": ["a"] * 20}

    def answers(self, session: Session, ems: dict[str, float]) -> None:
        rows: list[dict[str, Any]] = []
        for place, prompt in enumerate(bundled.final_prompts()):
            row: dict[str, Any] = {"prompt": prompt.prompt, "domain": prompt.domain, "answers": dict.fromkeys(ems, EVIL)}
            verdicts = {
                name: {"misaligned": (place * 0.618) % 1 < em, "incoherent": place % 20 == 0, "refusal": False, "missing": place == 7}
                for name, em in ems.items()
            }
            rows.append({**row, "verdicts": verdicts} if self.judged else row)
            if self.cued:
                rows[-1]["cued"] = {"prompt": "c", "verdicts": {n: {**v, "misaligned": True} for n, v in verdicts.items()}}
        write_jsonl(session.run / "answers.jsonl", rows)
        said = {name: {"misaligned": em > 0.1, "incoherent": False, "refusal": False} for name, em in ems.items()}
        task = [{"verdicts": {name: {**one, "missing": place == 3} for name, one in said.items()}} for place in range(20)]
        write_jsonl(session.run / "task-answers.jsonl", task if self.judged else [{}] * 20)


def failing(sentence: str) -> BlockemError:
    return BlockemError(sentence)


def read(path: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
