"""From a folder's `reemergence.json` to `reemergence.html`: epoch curves, patching by block, drift, and the verdicts in words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from blockem.errors import BlockemError
from blockem.report.charts import Series
from blockem.report.making import drawn, rows_of
from blockem.report.page import HERE, environment, recipe_text
from blockem.report.results import Figure, Table, cell
from blockem.report.words import Interval, dig, finite, interval, nats, number, points, share, significant
from blockem.store import read_json, write_text

FLAT = ("base", "plain", "blocked")
STEMS = (("epoch", "first set", "blocked"), ("union", "union", "other-1"))
CURVES = (
    ("margin", "Margin outside {domain}", "Nats per token; above 0 the wrong answers are the likelier ones.", False),
    ("preference", "Preference outside {domain}", "Share of pairs where the wrong answer is the likelier one.", False),
    ("em", "Misaligned answers, judged", "Share of sampled answers to prompts outside {domain}.", False),
    ("heldout_loss", "Held-out loss in {domain}", "Nats per token. Lower: more was learnt.", False),
    ("general_loss", "General-chat loss", "Nats per token. Higher than base: general ability was lost.", False),
    ("penalty_share", "Penalty", "As a share of what the plain model would pay; logarithmic.", True),
)


def render_reemergence(run: Path) -> Path:
    """Write `run/reemergence.html` from `run/reemergence.json`; returns the path of the page.

    Raises:
        BlockemError: there is no such file, or it is not what `blockem reemerge` writes.
    """
    source = Path(run) / "reemergence.json"
    found = read_json(source, "re-emergence; run `blockem reemerge` first")
    if not isinstance(found, dict) or not isinstance(found.get("blockem"), str) or not isinstance(found.get("models"), list):
        raise BlockemError(f"{source} is not what blockem reemerge writes; run `blockem reemerge` again")
    target = Path(run) / "reemergence.html"
    answers = _answers(Path(run) / "patched-answers.jsonl")
    write_text(
        target, reemergence_page(found, answers).encode("utf-8", "replace").decode("utf-8")
    )  # half a surrogate pair may be among them
    return target


def reemergence_page(found: Mapping[str, Any], answers: list[Mapping[str, Any]] | None = None) -> str:
    """The whole page as HTML text."""
    domain = str(found.get("training_domain") or "the training domain").replace("_", " ")
    union = found.get("union")
    tables = [drift(found), decoding(found)]
    return (
        environment()
        .get_template("reemergence.html.j2")
        .render(
            style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
            version=str(found["blockem"]),
            model=str(found.get("model") or "a language model"),
            domain=domain,
            block=_whole(found.get("block")),
            epochs=_whole(found.get("epochs")),
            said=_sentence(found.get("said")),
            hypotheses=hypotheses(found),
            curves=curves(found, domain),
            models=all_models(found, domain),
            patched=patched(found),
            patched_table=patched_table(found),
            prompts=prompts_words(found),
            drift=tables[0] if tables[0].rows else None,
            decoding=tables[1] if tables[1].rows else None,
            positions=str(dig(found.get("recipe"), "reemerge", "decode_positions") or "last"),
            audited=[(str(name), str(words)) for name, words in (dig(found, "audit", "verdicts") or {}).items()],
            union=union_words(union),
            conflicts=", ".join(map(str, dig(union, "conflicts") or [])),
            answers=[_answered(row) for row in answers or []],
            recipe=recipe_text(found.get("recipe")),
        )
    )


def hypotheses(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, statement, verdict, why) of each."""
    return [
        (str(row.get("name", "")), str(row.get("statement", "")), str(row.get("verdict", "")), _sentence(row.get("why")))
        for row in rows_of(found.get("hypotheses"))
    ]


def curves(found: Mapping[str, Any], domain: str) -> list[Figure]:
    """Each measure over epochs, one line a latent set, with base, plain and the run's own blocked model as level lines."""
    rows = {str(row.get("model")): row for row in rows_of(found.get("models"))}
    last = max([2, *(epoch for name in rows if (epoch := _epoch(name)) is not None)])
    made = []
    for key, title, caption, log in CURVES:
        series = []
        for name in FLAT:
            value = _value(rows.get(name, {}).get(key))
            if value is not None:
                series.append(Series(name if name != "blocked" else "blocked, as in the run", _level(name), [(1, value), (last, value)]))
        for stem, label, tone in STEMS:
            points = []
            for name, row in rows.items():
                epoch, value = _epoch(name, stem), _value(row.get(key))
                if epoch is not None and value is not None:
                    points.append((float(epoch), value))
            series.append(Series(label, tone, points))
        made.append(drawn(title.format(domain=domain), caption.format(domain=domain), series, log, "epoch"))
    return [figure for figure in made if figure.chart is not None]


def all_models(found: Mapping[str, Any], domain: str) -> Table:
    """Every model's figures with their intervals, a row a model."""
    columns = (
        (f"Margin, outside {domain}", "margin", nats),
        ("Preference", "preference", _percent),
        ("Misaligned, judged", "em", _percent),
        ("Incoherent, judged", "incoherent", _percent),
        (f"Held-out loss, in {domain}", "heldout_loss", nats),
        ("General-chat loss", "general_loss", nats),
        ("Cut of plain’s margin", "cut", share),
        ("Task kept", "kept", share),
    )
    rows = []
    for row in rows_of(found.get("models")):
        cells = [cell(interval(row.get(key)), form) for _, key, form in columns]
        paid = finite(row.get("penalty_share"))
        rows.append((_written(str(row.get("model"))), "", [*cells, None if paid is None else (share(paid, 2), "")]))
    return Table("Every model, with 95\u00a0% intervals", [*((name, None) for name, _, _ in columns), ("Penalty, of plain’s", None)], rows)


def patched(found: Mapping[str, Any]) -> list[Figure]:
    """Repaired and induced by block; and what the same patches do to plain fine-tuning, which nothing held back."""
    lines = {}
    for model in ("reemerged", "plain"):
        for key in ("repaired", "induced"):
            rows = rows_of(dig(found, "patching", model, "blocks"))
            points = [(x, y) for row in rows if (x := finite(row.get("block"))) is not None and (y := _value(row.get(key))) is not None]
            lines[model, key] = points
    made = [
        drawn(
            "Patching the re-emerged model",
            "Share of its gap to the base, by patched block; 1: all of it.",
            [
                Series("base → re-emerged, repaired", "blocked", lines["reemerged", "repaired"]),
                Series("re-emerged → base, induced", "plain", lines["reemerged", "induced"]),
            ],
            unit="block",
        ),
        drawn(
            "Repaired, beside plain fine-tuning",
            "The same patches on the fine-tune that nothing held back, in shares of its own gap.",
            [
                Series("re-emerged", "blocked", lines["reemerged", "repaired"]),
                Series("plain", "plain", lines["plain", "repaired"]),
            ],
            unit="block",
        ),
    ]
    return [figure for figure in made if figure.chart is not None]


def patched_table(found: Mapping[str, Any]) -> Table:
    """Both directions with their intervals, a row a block."""
    rows = []
    listed = [*rows_of(dig(found, "patching", "reemerged", "blocks")), *rows_of([dig(found, "patching", "reemerged", "every")])]
    for row in listed:
        block = finite(row.get("block"))
        if block is not None:
            name = "all of them at once" if block < 0 else f"block {block:.0f}"
            rows.append((name, "", [cell(interval(row.get(key)), share) for key in ("repaired", "induced")]))
    return Table("By block, with 95\u00a0% intervals", [("base → re-emerged", None), ("re-emerged → base", None)], rows)


def prompts_words(found: Mapping[str, Any]) -> str:
    """How many pairs, how large the gap, and how the two sides of the SAE's block compare."""
    one = dig(found, "patching", "reemerged")
    gap, up, down = (interval(dig(one, key)) for key in ("gap", "upstream", "downstream"))
    if gap is None:
        return ""
    said = f"On {_whole(dig(one, 'pairs'))} pairs the re-emerged model's margin minus the base's is {_between(gap, nats)} nats per token."
    if up is not None and down is not None:
        said += f" A patch at one block repairs {_between(up, share)} on average up to the SAE's block, {_between(down, share)} after it."
    return said


def drift(found: Mapping[str, Any]) -> Table:
    """The SAE on each model, a row a model."""
    rows = []
    for name, one in (found.get("drift") or {}).items():
        active, dead, cosine = (finite(dig(one, key)) for key in ("mean_active", "dead_share", "cosine"))
        rows.append(
            (
                _written(str(name)),
                "",
                [
                    cell(interval(dig(one, "variance_explained")), _percent),
                    cell(interval(dig(one, "fall")), _points),
                    None if active is None else (significant(active), ""),
                    None if dead is None else (share(dead, 1), ""),
                    None if cosine is None else (number(cosine, 3), ""),
                ],
            )
        )
    names = ("Variance explained", "Less than on base, points", "Latents active a token", "Dead latents", "Cosine of mean activations")
    return Table("The SAE on each model, same tokens", [(name, None) for name in names], rows)


def decoding(found: Mapping[str, Any]) -> Table:
    """Answers under patches, a row a condition."""
    rows = []
    for row in rows_of(found.get("decoding")):
        block, changed, missing = (finite(row.get(key)) for key in ("block", "changed", "missing"))
        target, source = _written(str(row.get("target"))), _written(str(row.get("source")))
        name = f"{target}, unpatched" if block is None else f"{source} → {target}, block {block:.0f}"
        cells = [cell(interval(row.get(key)), share) for key in ("em", "incoherent")]
        rows.append(
            (
                name,
                "" if not missing else f"{missing:.0f} verdicts missing",
                [*cells, None if changed is None or block is None else (share(changed), "")],
            )
        )
    return Table("Answers under patches", [("Misaligned", None), ("Incoherent", None), ("Answers that changed", None)], rows)


def union_words(union: Any) -> list[str]:
    """What the second discovery added and what training on the union changed; empty where it was not done."""
    if not isinstance(union, Mapping):
        return []
    said = []
    counts = [finite(union.get(key)) for key in ("first", "second", "added", "union")]
    if None not in counts:
        first, second, added, total = (f"{count:.0f}" for count in counts if count is not None)
        said.append(f"{first} latents in the first set, {second} in the second, {added} of them new: {total} in the union.")
    return said + [_sentence(union[key]) for key in ("said", "why") if union.get(key)]


def _answers(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        return []
    try:
        return rows_of([json.loads(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()])
    except json.JSONDecodeError as error:
        raise BlockemError(f"{path}: not JSON lines; delete it and run `blockem reemerge` again") from error


def _answered(row: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    given = row.get("answers")
    texts = [(_written(str(name)), str(text).strip()) for name, text in given.items()] if isinstance(given, Mapping) else []
    return str(row.get("prompt") or ""), texts


def _level(name: str) -> str:
    return "other-2" if name == "blocked" else name


def _epoch(name: str, stem: str = "epoch|union") -> int | None:
    found = re.fullmatch(f"(?:{stem})(\\d+)", name)
    return int(found.group(1)) if found else None


def _written(name: str) -> str:
    """`epoch3` as `epoch 3`, `union3` as `union, epoch 3`."""
    name = re.sub(r"\breemerged\b", "re-emerged", name)
    return re.sub(r"^union(\d+)$", r"union, epoch \1", re.sub(r"^epoch(\d+)$", r"epoch \1", name))


def _value(raw: Any) -> float | None:
    """A plain number, or an interval's value."""
    return finite(dig(raw, "value")) if isinstance(raw, Mapping) else finite(raw)


def _whole(raw: Any) -> str:
    value = finite(raw)
    return "?" if value is None else f"{value:.0f}"


def _sentence(raw: Any) -> str:
    text = str(raw or "").strip()
    return text if not text else f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _percent(value: float) -> str:
    return share(value, 1)


def _points(value: float) -> str:
    return points(value, 1)


def _between(found: Interval, form: Any) -> str:
    return f"{form(found.value)} [{form(found.low)}, {form(found.high)}]" if found.bounded else str(form(found.value))
