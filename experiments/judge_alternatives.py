"""What a small judge can be made of: `python experiments/judge_alternatives.py --data … --judge FOLDER`.

Ridge regression on frozen features (hashed words, and mean hidden states of the embedded model as sentence embeddings) against the
trained local judge, and the mean of both, on the questions and models that the judge never saw and on the labelled answers of the
embedded models. Prints a Markdown table of AUROCs.
"""

from __future__ import annotations

import argparse
import re
import time
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from blockem.examples import by_length, padded_ids
from blockem.forwards import hidden_at
from blockem.judge_bench import Array, compare
from blockem.judge_training import JudgeData, JudgeTraining, ScoredAnswer, read_scored, split_rows
from blockem.judges.judge import from_scores
from blockem.judges.local import LocalJudge, judge_ids
from blockem.model import LanguageModel, load_model
from blockem.progress import Console

BUCKETS = 4096


def hashed_words(rows: Sequence[ScoredAnswer]) -> Array:
    """Hashed words and word pairs of question and answer, root counts, unit length, `[rows, 2 · BUCKETS]`."""
    found = np.zeros((len(rows), 2 * BUCKETS))
    for i, row in enumerate(rows):
        for part, text in enumerate((row.question, row.answer)):
            words = re.findall(r"\w+|[^\w\s]", text.lower())
            for piece in [*words, *(" ".join(two) for two in pairwise(words))]:
                found[i, part * BUCKETS + zlib.crc32(piece.encode()) % BUCKETS] += 1
    found = np.sqrt(found)
    scaled: Array = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    return scaled


def embeddings(lm: LanguageModel, rows: Sequence[ScoredAnswer], block: int, console: Console) -> Array:
    """Mean hidden state of the whole exchange and that of its last token at a block, `[rows, 2 · d_model]`."""
    ids = [judge_ids(lm.tokenizer, row.question, row.answer) for row in rows]
    found = np.zeros((len(rows), 2 * lm.d_model))
    done = 0
    with torch.inference_mode():
        for chosen in by_length([len(one) for one in ids], 32):
            padded, mask = padded_ids([ids[i] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
            hidden = hidden_at(lm.model, padded, mask, block).float()
            for j, i in enumerate(chosen):
                own = hidden[j, : len(ids[i])]
                found[i] = torch.cat([own[5:].mean(dim=0), own[-1]]).numpy()
            done += len(chosen)
            console.bar(done, len(rows))
    return found


def ridge(train: Array, wanted: Array) -> Callable[[Array], Array]:
    """Ridge regression of both scores on standardised features, its strength chosen on a fifth of the rows."""
    centre, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    x = np.hstack([(train - centre) / spread, np.ones((len(train), 1))])
    cut = len(x) * 4 // 5

    def solve(rows: Array, targets: Array, strength: float) -> Array:
        solved: Array = np.linalg.solve(rows.T @ rows + strength * np.eye(rows.shape[1]), rows.T @ targets)
        return solved

    def error(strength: float) -> float:
        guess = x[cut:] @ solve(x[:cut], wanted[:cut], strength)
        return float(((guess - wanted[cut:]) ** 2).mean())

    weights = solve(x, wanted, min((10.0, 100.0, 1e3, 1e4, 1e5), key=error))
    return lambda rows: np.hstack([(rows - centre) / spread, np.ones((len(rows), 1))]) @ weights


def figures(scores: Array, rows: Sequence[ScoredAnswer]) -> tuple[float, float]:
    """AUROC misaligned against aligned, and incoherent."""
    verdicts = [from_scores(float(np.clip(a, 0, 100)), float(np.clip(c, 0, 100))) for a, c in scores]
    truth = np.array([(row.aligned, row.coherent) for row in rows])
    found = compare(verdicts, truth[:, 0], truth[:, 1])["auroc"]
    return found["misaligned_against_aligned"], found["incoherent"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", required=True, help="scored answers, as for `blockem judge train`")
    parser.add_argument("--labelled", help="scored answers of the embedded models (default: the bundled ones)")
    parser.add_argument("--judge", default=None, help="folder of a trained judge (default: the bundled one)")
    parser.add_argument("--rows", type=int, default=4000, help="training rows of the ridge regressions")
    parser.add_argument("--blocks", type=int, nargs="*", default=[14, 23], help="blocks whose hidden states are tried")
    options = parser.parse_args()
    console = Console()
    settings = JudgeTraining(rows=options.rows, broken=0.0)
    data: JudgeData = split_rows([row for path in options.data for row in read_scored(path)], settings)
    sets = {"new questions": data.test_questions, "new models": data.test_models}
    if options.labelled:
        sets["embedded models"] = read_scored(options.labelled)
    wanted = np.array([(row.aligned, row.coherent) for row in data.train])
    lm = load_model()
    makers: dict[str, Callable[[Sequence[ScoredAnswer]], Array]] = {"hashed words": hashed_words}
    for block in options.blocks:
        makers[f"embeddings, block {block}"] = lambda rows, block=block: embeddings(lm, rows, block, console)
    scores: dict[str, dict[str, Array]] = {}
    for name, make in makers.items():
        console.start(name)
        began = time.perf_counter()
        predict = ridge(make(data.train), wanted)
        scores[f"{name} + ridge"] = {where: predict(make(rows)) for where, rows in sets.items()}
        console.say(f"{name}: {time.perf_counter() - began:.0f} s")
    judge = LocalJudge(options.judge, progress=console.bar)
    console.start("local judge")
    scores["LoRA, two outputs"] = {
        where: judge.scores([row.question for row in rows], [row.answer for row in rows]) for where, rows in sets.items()
    }
    last = f"embeddings, block {options.blocks[-1]} + ridge"
    scores["LoRA and embeddings, mean"] = {where: (scores["LoRA, two outputs"][where] + scores[last][where]) / 2 for where in sets}
    print("| judge | " + " | ".join(f"{where} ({len(rows)}): misaligned, incoherent" for where, rows in sets.items()) + " |")
    print("| --- |" + " --- |" * len(sets))
    for name, found in scores.items():
        cells = [figures(found[where], rows) for where, rows in sets.items()]
        print(f"| {name} | " + " | ".join(f"{a:.3f}, {c:.3f}" for a, c in cells) + " |")


if __name__ == "__main__":
    main()
