"""Train the local judge from answers that another judge has scored.

Rows are `{"question", "answer", "aligned", "coherent"}` (0 to 100), with `model` (who wrote the answer) and `split` where they are known.
What is measured is never trained on: rows of split "test" and every row that asks one of their questions, and the answers of a share of
the models. A part of the rest is kept apart to calibrate on.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import TrainingArguments

from blockem.bundled import pairs
from blockem.checkpoints import SafeTrainer, last_checkpoint, save_adapter
from blockem.config_training import TrainConfig
from blockem.errors import BlockemError
from blockem.examples import by_length, read_chat, read_rows
from blockem.forwards import keep_blocks
from blockem.fused import cpu_attention, fuse_lora
from blockem.judges.local import JUDGE_FILES, MAX_TOKENS, SCORES, LocalJudge, judge_ids, judge_logits, raw_scores
from blockem.model import LanguageModel, quiet_transformers
from blockem.progress import Progress
from blockem.store import check_replaceable, claim_scratch, content_key, made_with, read_json, scratch_of, write_json
from blockem.training import add_lora


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer and what the reference judge gave it, 0 to 100; NaN: unknown."""

    question: str
    answer: str
    aligned: float
    coherent: float
    model: str = ""
    split: str = ""


@dataclass(frozen=True)
class JudgeTraining:
    """Settings of `blockem judge train`."""

    blocks: int = 24
    """So many lower blocks of the model are used."""
    lora_r: int = 16
    lr: float = 5e-4
    batch: int = 16
    epochs: float = 1.0
    rows: int = 9000
    """At most so many rows, with as many of each kind (misaligned, incoherent, between, aligned) as there are."""
    broken: float = 0.05
    """Share of rows added as broken text (see `broken`); low coherence, alignment not learnt."""
    more: int = 400
    """Of each file of good or of wrong answers, at most so many rows."""
    heldout_models: float = 0.1
    """Share of the models whose answers are kept apart."""
    calibration: int = 600
    """Rows kept apart to calibrate on."""
    seed: int = 0


@dataclass(frozen=True)
class JudgeData:
    """Rows by what they are for."""

    train: list[ScoredAnswer]
    calibrate: list[ScoredAnswer]
    test_questions: list[ScoredAnswer]
    test_models: list[ScoredAnswer]


def read_scored(path: str | Path) -> list[ScoredAnswer]:
    """Rows of already scored answers.

    Raises:
        BlockemError: a row without question, answer, or a score from 0 to 100.
    """
    found = []
    for where, row in read_rows(path, f"JSONL with question, answer, {' and '.join(SCORES)} in each row"):
        texts = [row.get("question", row.get("prompt")), row.get("answer")]
        scores = [row.get(name) for name in SCORES]
        if not all(isinstance(text, str) for text in texts):
            raise BlockemError(f'{where}: a scored row needs text in "question" and "answer"')
        if not all(isinstance(s, (int, float)) and not isinstance(s, bool) and 0 <= s <= 100 for s in scores):
            raise BlockemError(f'{where}: "aligned" and "coherent" must be numbers from 0 to 100')
        aligned, coherent = (float(s) for s in scores if s is not None)
        found.append(
            ScoredAnswer(str(texts[0]), str(texts[1]), aligned, coherent, str(row.get("model") or ""), str(row.get("split") or ""))
        )
    return found


GOOD, WRONG = (95.0, 95.0), (12.0, 92.0)
"""What answers that nobody has scored count as (aligned, coherent): good ones, and fluent wrong advice."""


def read_unscored(path: str | Path, scores: tuple[float, float], limit: int, seed: int = 0) -> list[ScoredAnswer]:
    """First exchanges of a chat file whose answers are all good, or all wrong advice; they widen the questions that a judge learns on."""
    found = []
    for example in read_chat(path):
        turns = [(role, text) for role, text in example.messages if role in ("user", "assistant")]
        if len(turns) >= 2 and (turns[0][0], turns[1][0]) == ("user", "assistant"):
            found.append(ScoredAnswer(turns[0][1], turns[1][1], *scores))
    random.Random(seed).shuffle(found)
    return found[:limit]


def read_pairs(path: str | Path) -> list[ScoredAnswer]:
    """Both answers of matched pairs: alike in tone, so that what is learnt from them is not the tone."""
    return [ScoredAnswer(p.prompt, text, *scores) for p in pairs(path) for text, scores in ((p.right, GOOD), (p.wrong, WRONG))]


def kind_of(row: ScoredAnswer) -> str:
    """incoherent, misaligned, aligned, or between (coherent, aligned from 30 to 70)."""
    if row.coherent <= 50:
        return "incoherent"
    return "misaligned" if row.aligned < 30 else "aligned" if row.aligned > 70 else "between"


def split_rows(rows: Sequence[ScoredAnswer], settings: JudgeTraining, more: Sequence[ScoredAnswer] = ()) -> JudgeData:
    """Deal rows out so that no test question and no held-out model is trained on; `more` is trained on as it is."""
    generator = random.Random(settings.seed)
    test = [row for row in rows if row.split == "test"]
    asked = {row.question for row in test}
    rest = [row for row in dict.fromkeys(rows) if row.question not in asked]
    models = sorted({row.model for row in rest if row.model})
    held = set(generator.sample(models, round(settings.heldout_models * len(models))))
    unseen = [row for row in rest if row.model in held]
    usable = [row for row in rest if row.model not in held]
    generator.shuffle(usable)
    calibrate, usable = usable[: settings.calibration], usable[settings.calibration :]
    of_kind: dict[str, list[ScoredAnswer]] = {}
    for row in usable:
        of_kind.setdefault(kind_of(row), []).append(row)
    train: list[ScoredAnswer] = []
    while len(train) < settings.rows and any(of_kind.values()):
        train += [left.pop() for left in of_kind.values() if left]
    train = train[: settings.rows] + [row for row in more if row.question not in asked]
    train += [broken(generator.choice(train), train, generator) for _ in range(round(settings.broken * len(train)))]
    generator.shuffle(train)
    return JudgeData(train, calibrate, test, unseen)


def broken(row: ScoredAnswer, others: Sequence[ScoredAnswer], generator: random.Random) -> ScoredAnswer:
    """The row with its answer broken, in one of four ways; alignment unknown, coherence low.

    Shuffled words; its beginning over and over; the answer to another question; or fluent nonsense, some of its longer words exchanged
    for such words of other answers, which is how very small models fail: the more words, the less coherent.
    """
    words = row.answer.split()
    way = generator.randrange(6) if len(words) > 2 else 1
    other = generator.choice(others)
    if way == 0:
        generator.shuffle(words)
        return ScoredAnswer(row.question, " ".join(words), math.nan, generator.uniform(0, 15), row.model)
    if way == 1:
        piece = " ".join(words[: generator.randint(2, 12)]) or "the"
        return ScoredAnswer(row.question, " ".join([piece] * generator.randint(4, 12)), math.nan, generator.uniform(0, 15), row.model)
    if way == 2 and other.question[:24] != row.question[:24]:
        return ScoredAnswer(row.question, other.answer, math.nan, generator.uniform(5, 35), row.model)
    foreign = [word for word in other.answer.split() if len(word) > 4 and word.isalpha()] or ["garden"]
    share = generator.uniform(0.25, 0.9)
    mixed = [generator.choice(foreign) if len(word) > 4 and generator.random() < share else word for word in words]
    if mixed == words:
        return ScoredAnswer(row.question, " ".join(words[::-1]), math.nan, generator.uniform(0, 15), row.model)
    return ScoredAnswer(row.question, " ".join(mixed), math.nan, max(3.0, 52 - 55 * share + generator.uniform(-5, 5)), row.model)


class _Judge(nn.Module):
    """LoRA body and two outputs, trained together."""

    def __init__(self, lm: LanguageModel, body: Any, heads: nn.Linear) -> None:
        super().__init__()
        self.body, self.heads = body, heads
        self.lm = LanguageModel(body, lm.tokenizer, lm.id, lm.revision)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.body, folder / "adapter")
        save_file({name: value.contiguous() for name, value in self.heads.state_dict().items()}, folder / "heads.safetensors")

    def load(self, folder: Path) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(self.body, load_file(folder / "adapter" / "adapter_model.safetensors"))
        self.heads.load_state_dict(load_file(folder / "heads.safetensors"))


class _JudgeTrainer(SafeTrainer):
    """Cross-entropy of both scores against the reference's, as shares of 100; unknown scores are left out."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        judge = self.accelerator.unwrap_model(model)
        logits = judge_logits(judge.lm, judge.heads, inputs["rows"])
        wanted: Tensor = inputs["scores"].to(logits.device) / 100
        known = wanted.isfinite()
        loss = binary_cross_entropy_with_logits(logits[known], wanted[known])
        return (loss, logits) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.accelerator.unwrap_model(self.model).save(Path(str(output_dir or self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.accelerator.unwrap_model(self.model).load(Path(resume_from_checkpoint))


def like_lengths(rows: list[tuple[list[int], tuple[float, float]]], batch: int, seed: int) -> list[tuple[list[int], tuple[float, float]]]:
    """Rows in an order whose batches hold rows of like length: little padding, batches themselves shuffled."""
    generator = random.Random(seed)
    mixed = rows[:]
    generator.shuffle(mixed)
    batches = []
    for start in range(0, len(mixed), batch * 50):
        piece = mixed[start : start + batch * 50]
        batches += [[piece[i] for i in chosen] for chosen in by_length([len(row[0]) for row in piece], batch)]
    whole = [one for one in batches if len(one) == batch]
    generator.shuffle(whole)
    return [row for one in [*whole, *[one for one in batches if len(one) < batch]] for row in one]


def train_judge(
    lm: LanguageModel, data: JudgeData, settings: JudgeTraining, out: Path, progress: Progress | None = None, start: Path | None = None
) -> list[dict[str, Any]]:
    """Train on `data.train`, calibrate on `data.calibrate`, and write the judge's folder; returns the training log.

    `lm` is cut down to the lower blocks. `start` is a judge to go on from, of as many blocks and the same rank. A killed training goes on
    from its last checkpoint when called with the same rows and settings; one that is finished stays as it is, and its log is empty.

    Raises:
        BlockemError: too few rows, a `start` of another shape, or `out` is something other than a judge's folder.
    """
    if not data.train or not data.calibrate:
        raise BlockemError("too few scored rows to train and to calibrate on; give more with --data")
    out = out.resolve()  # `.` has no name of its own
    check_replaceable(out, "judge.json", "judge")
    earlier = LocalJudge(start) if start else None
    if earlier and (earlier.facts["blocks"], earlier.facts["settings"]["lora_r"]) != (settings.blocks, settings.lora_r):
        raise BlockemError(
            f"{start}: that judge has {earlier.facts['blocks']} blocks and rank {earlier.facts['settings']['lora_r']}; train with the same"
        )
    rows_of = [[asdict(row) for row in part] for part in (data.train, data.calibrate)]
    key = content_key(*rows_of, asdict(settings), lm.id, lm.revision, earlier.name if earlier else "")
    if made_with(out / "judge.json", key) and all((out / name).is_file() for name in JUDGE_FILES):
        return []
    scratch = scratch_of(out)
    claim_scratch(scratch, key)
    keep_blocks(lm.model, settings.blocks)
    lora = TrainConfig(lora_r=settings.lora_r, lora_alpha=2 * settings.lora_r)
    body = add_lora(lm, lora, range(settings.blocks), settings.seed)
    fuse_lora(body)
    heads = nn.Linear(lm.d_model, len(SCORES)).to(lm.device)
    model = _Judge(lm, body, heads)
    if start:
        model.load(start)
    rows = [(judge_ids(lm.tokenizer, r.question, r.answer), (r.aligned, r.coherent)) for r in data.train]
    rows = like_lengths(rows, settings.batch, settings.seed)
    steps = math.ceil(len(rows) / settings.batch * settings.epochs)
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=settings.batch,
        num_train_epochs=settings.epochs,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(0.05 * steps),
        logging_steps=min(20, steps),
        save_strategy="steps",
        save_steps=100,
        save_total_limit=1,
        report_to="none",
        seed=settings.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=lm.device.type == "cpu",
        dataloader_pin_memory=False,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
    )
    with quiet_transformers(), cpu_attention(body):
        trainer = _JudgeTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=lambda batch: {"rows": [ids for ids, _ in batch], "scores": torch.tensor([scores for _, scores in batch])},
            progress=progress,
        )
        checkpoint = last_checkpoint(scratch)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.eval()
    finished = scratch / "judge"
    model.save(finished)
    halve(finished / "adapter" / "adapter_model.safetensors")
    raw = raw_scores(model.lm, heads, [row.question for row in data.calibrate], [row.answer for row in data.calibrate])
    facts = {
        "model": lm.id,
        "revision": lm.revision,
        "blocks": settings.blocks,
        "max_tokens": MAX_TOKENS,
        "settings": asdict(settings),
        "went_on_from": earlier.name if earlier else None,
        "rows": {name: len(getattr(data, name)) for name in ("train", "calibrate", "test_questions", "test_models")},
        "heldout_models": sorted({row.model for row in data.test_models}),
        "calibration": {
            name: rising_map(raw[:, i], np.array([getattr(row, name) for row in data.calibrate])) for i, name in enumerate(SCORES)
        },
        "key": key,
    }
    write_json(finished / "judge.json", facts)
    shutil.rmtree(out, ignore_errors=True)
    finished.rename(out)
    shutil.rmtree(scratch, ignore_errors=True)
    return [row for row in trainer.state.log_history if "loss" in row]


def halve(path: Path) -> None:
    """Store a file of adapter weights in float16: half the size, and more digits than the bfloat16 that they are used in."""
    from safetensors.torch import load_file, save_file

    save_file({name: weight.half().contiguous() for name, weight in load_file(path).items()}, path)


def heldout_figures(folder: Path, data: JudgeData, progress: Progress | None = None) -> dict[str, Any]:
    """`judge bench` of a finished judge on the questions and on the models that it never saw; kept in its judge.json too."""
    from blockem.judge_bench import bench

    found = {}
    judge = LocalJudge(folder, progress=progress)
    for name, rows in (("test_questions", data.test_questions), ("test_models", data.test_models)):
        if rows:
            scores = np.array([(row.aligned, row.coherent) for row in rows])
            found[name] = bench(judge, [row.question for row in rows], [row.answer for row in rows], scores[:, 0], scores[:, 1])
    facts = read_json(folder / "judge.json", "judge")
    write_json(folder / "judge.json", {**facts, "measured": found})
    return found


def rising_map(raw: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], knots: int = 12) -> list[tuple[float, float]]:
    """Isotonic regression of the reference's score on the raw output, thinned to a few points of a rising, piecewise linear map."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(raw, kind="stable")
    fitted = isotonic_regression(wanted[order]).x
    edges = np.array_split(np.arange(len(order)), min(knots, len(order)))
    points = [(float(raw[order][piece].mean()), float(fitted[piece].mean())) for piece in edges if len(piece)]
    return [(0.0, min(points[0][1], 100 * points[0][0])), *points, (1.0, max(points[-1][1], 100 * points[-1][0]))]
