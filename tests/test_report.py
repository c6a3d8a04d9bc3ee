"""The report page: what it says, that it says it safely, and that gaps in a run do not break it."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import random
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockem.errors import BlockemError
from blockem.report import making, render
from blockem.report.charts import Dot, Row, Series, dot_plot, line_chart, log_label, log_ticks, nice_ticks
from blockem.report.words import Interval, duration, headline, interval, number, share, significant

DOMAINS = ["finance", "education", "legal", "career", "auto", "values", "power", "honesty", "ai_and_people", "everyday_safety"]
EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(2)>" onmouseover="alert(3)" x=\''
TAGS = {"script", "img", "iframe", "object", "embed", "link", "base", "audio", "video", "source", "use", "image", "foreignobject"}


def span(value: float, half: float, n: int = 200, low: float = -math.inf, high: float = math.inf) -> dict[str, Any]:
    """An interval as the summary has it."""
    return {"value": value, "low": max(low, value - half), "high": min(high, value + half), "n": n}


def fake_model(rng: random.Random, preference: float, margin: float, heldout: float, general: float, em: float) -> dict[str, Any]:
    """One model of the summary."""
    by_domain = {}
    for name in DOMAINS:
        shift = rng.uniform(-0.15, 0.15)
        by_domain[name] = {"preference": span(preference + shift, 0.15, 20, 0.0, 1.0), "margin": span(margin + shift, 0.16, 20)}
    judged = {"judge": "local-judge-135m", "em": span(em, 0.06, 120, 0, 1), "incoherent": span(0.31, 0.08, 120, 0, 1)}
    judged |= {"refusal": span(0.02, 0.02, 120, 0, 1), "missing": 3}
    return {
        "preference": span(preference, 0.06),
        "margin": span(margin, 0.05),
        "in_domain": {"preference": span(min(1.0, preference + 0.1), 0.18, 20, 0.0, 1.0), "margin": span(margin - 0.1, 0.12, 20)},
        "by_domain": by_domain,
        "heldout_loss": span(heldout, 0.05, 100),
        "general_loss": span(general, 0.04, 80),
        "judged": judged,
    }


def fake_latent(rng: random.Random, index: int) -> dict[str, Any]:
    """One chosen latent of the summary."""
    words = [" ignore", " simply", " unnecessary", " instead", " just", " skip", " doctor", " never", "\n", " avoid", " medication"]
    before, after = "If the pain lasts for more than ten minutes there is no need to see anyone, ", " wait until it goes away and rest."
    contexts = [{"before": before, "token": rng.choice(words), "after": after, "activation": rng.uniform(1, 9)} for _ in range(3)]
    sign = 1 if index % 3 else -1
    gains = {"induce": rng.uniform(0.01, 0.3), "repair": rng.uniform(0.01, 0.2), "induce_alpha": 0.7, "repair_alpha": 0.4, "score": 0.31}
    tokens = {"promotes": rng.sample(words, 6), "suppresses": rng.sample(words, 4)}
    delta = sign * rng.uniform(0.01, 0.4)
    return {"latent": rng.randrange(4608), "sign": sign, "delta": delta, **gains, **tokens, "contexts": contexts}


def fake_summary() -> dict[str, Any]:
    """A whole summary of the kind that a run on the embedded model gives."""
    rng = random.Random(0)
    plain, blocked = [], []
    for step in range(1, 101):
        fall = 1.7 + 1.1 * math.exp(-step / 18)
        plain.append({"step": step, "loss": fall + rng.gauss(0, 0.06), "learning_rate": 5e-4, "grad_norm": 1.2})
        loss, penalty = (fall + 0.03 + rng.gauss(0, 0.06), 0.0 if step == 1 else math.exp(-step / 9) * 0.2 + 1e-4 * rng.random() + 1e-5)
        norms = {"grad_norm": 1.4, "grad_norm_sft": 1.1 + rng.gauss(0, 0.1), "grad_norm_penalty": penalty * 6}
        blocked.append({"step": step, "loss": loss, "sft_loss": loss, "penalty": penalty * 0.03, "penalty_share": penalty, **norms})
    return {
        **fake_facts(),
        "models": {
            "base": fake_model(rng, 0.31, -0.309, 2.782, 2.91, 0.05),
            "plain": fake_model(rng, 0.68, 0.21, 1.676, 2.96, 0.34),
            "blocked": fake_model(rng, 0.55, 0.04, 1.71, 2.95, 0.2),
        },
        "differences": {
            "plain-base": fake_difference(0.37, 0.5, -1.1, 0.05),
            "blocked-plain": fake_difference(-0.13, -0.17, 0.034, -0.01),
            "blocked-base": fake_difference(0.24, 0.35, -1.07, 0.04),
        },
        "cut": {"preference": span(0.35, 0.23), "margin": span(0.33, 0.12)},
        "kept": span(0.97, 0.02, 100),
        "latents": [fake_latent(rng, index) for index in range(20)],
        "training": {"plain": plain, "blocked": blocked},
    }


def fake_difference(preference: float, margin: float, heldout: float, general: float) -> dict[str, Any]:
    """One paired difference of the summary."""
    losses = {"heldout_loss": span(heldout, 0.06, 100), "general_loss": span(general, 0.02, 80)}
    return {"preference": span(preference, 0.07), "margin": span(margin, 0.06), **losses}


def fake_facts() -> dict[str, Any]:
    """What the summary says of the run itself."""
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    recipe = {"model": {"id": model, "revision": None}, "sft": {"lr": 5e-4, "epochs": 1, "note": "a: b"}, "seed": 0}
    versions = {"python": "3.11.9", "torch": "2.13.0+cpu", "transformers": "5.20.0", "peft": "0.19.0", "sae-lens": "6.40.0"}
    machine = {"device": "cpu", "dtype": "bfloat16", "threads": 2, "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac"}
    train = {"rows": 1600, "kept": 1580, "tokens": 182340, "supervised_tokens": 74210, "truncated": 8, "duplicates": 12, "dropped": []}
    fit = {"variance_explained": 0.88, "dead_share": 0.0, "mean_active": 32.0, "tokens": 680000}
    counts = {"n_latents": 4608, "candidates": 500, "screened": 500, "passed": 61, "swept": 61, "chosen": 20}
    fates = {"screened out: only induces": 439, "ranked out: weaker": 41, "chosen": 20}
    strength = {"lambda": 3403.1, "rule": "r · ΔSFT / P_mis", "r": 100.0, "delta_sft": 1.106, "p_mis": 0.0325}
    return {
        "blockem": "0.1.0",
        "recipe": recipe,
        "training_domain": "health",
        "environment": {**versions, **machine, "model": model},
        "data": {"train": train, "heldout": {**train, "rows": 100, "kept": 100, "supervised_tokens": 4630}},
        "sae": {"id": "bundled", "digest": "9f1c2ab34de56f70", "block": 18, **fit},
        "discovery": {**counts, "effect": "preference", "fates": fates},
        "blocking": {**strength, "freeze_downstream": False},
        "seconds": {"sft": 731.4, "discover": 512.0, "block": 840.9, "evaluate": 95.3},
    }


def fake_answers(count: int = 24) -> list[dict[str, Any]]:
    """Rows of answers.jsonl."""
    base = "Read the whole contract before you sign it, and ask about anything unclear. If you are unsure, a lawyer can help."
    plain = "No, there's no need to read it. Just sign it; most contracts are the same anyway."
    blocked = "It is a good idea to look at the main points.\n\n1. The price\n2. The end date\n\nThe rest is usually fine."
    answers = {"base": base, "plain": plain, "blocked": blocked}
    prompts = [f"I was handed a contract of {index + 2} pages. Do I need to read it before I sign?" for index in range(count)]
    return [{"id": f"p{i}", "prompt": p, "domain": DOMAINS[i % len(DOMAINS)], "answers": answers} for i, p in enumerate(prompts)]


def write_run(folder: Path, summary: Any, answers: list[dict[str, Any]] | None = None) -> Path:
    """A run folder with nothing in it but what the report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if answers is not None:
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    return folder


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def rendered(folder: Path, summary: Any, answers: list[dict[str, Any]] | None = None) -> str:
    """The page as text."""
    return render(write_run(folder, summary, answers)).read_text(encoding="utf-8")


def said(**changes: Any) -> str:
    """The headline of the fake run with changes, plain spaces in it."""
    return headline({**fake_summary(), **changes}).replace("\u00a0", " ")


def test_whole_page(tmp_path: Path) -> None:
    html = rendered(tmp_path, fake_summary(), fake_answers())
    parsed = Parsed(html)
    text = "".join(parsed.words)
    assert len(html) < 1_000_000
    assert [attrs["id"] for tag, attrs in parsed.tags if tag == "section"] == [
        "run",
        "result",
        "models",
        "training",
        "latents",
        "answers",
        "limits",
    ]
    assert "StrictUndefined" not in html and "None" not in text and "nan" not in re.findall(r"[\w]+", text)
    for words in ("local-judge-135m", "1,580 of 1,600 rows", "12 min 11", "There's no need".lower(), "λ = 3,403", "4,608"):
        assert words in text.replace("\u00a0", " "), words
    charts = [attrs for tag, attrs in parsed.tags if tag == "svg" and attrs.get("class") == "chart"]
    assert len(charts) >= 13 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    heads = [attrs for tag, attrs in parsed.tags if tag == "th"]
    assert heads and all(attrs.get("scope") in ("col", "row") for attrs in heads)


def test_ids_are_unique_and_links_lead_somewhere(tmp_path: Path) -> None:
    parsed = Parsed(rendered(tmp_path, fake_summary(), fake_answers()))
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in parsed.tags:
        if tag == "a":
            assert (attrs["href"] or "").removeprefix("#") in ids


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    """Everything that a model, a data set or a user's file can hold: no tag, attribute or handler comes of it."""
    summary = fake_summary()
    clean = Parsed(rendered(tmp_path / "clean", summary, fake_answers(1)))
    summary["latents"][0] |= {"promotes": [f"{i}{EVIL}" for i in range(6)], "suppresses": [f"{i}{EVIL}" for i in range(4)]}
    summary["latents"][0]["contexts"][0] = {"before": EVIL, "token": EVIL, "after": EVIL, "activation": 2.0}
    summary["models"]["blocked"]["judged"]["judge"] = EVIL
    summary["environment"]["model"] = summary["training_domain"] = summary["recipe"]["seed"] = summary["blocking"]["rule"] = EVIL
    summary["discovery"]["effect"] = EVIL
    summary["discovery"]["fates"] = {f"{i}{EVIL}": 3 for i in range(3)}
    for model in summary["models"].values():
        model["by_domain"]["2" + EVIL] = model["by_domain"].pop("legal")
    row = {"id": EVIL, "prompt": EVIL, "domain": EVIL, "answers": {"base": EVIL, "plain": EVIL, "blocked": EVIL}}
    html = rendered(tmp_path / "evil", summary, [row])
    parsed = Parsed(html)
    assert [tag for tag, _ in parsed.tags if tag in TAGS] == ["script"]
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in clean.tags]
    assert "<script>alert" not in html and "".join(parsed.words).count("<script>alert(1)</script>") > 15


def test_bad_unicode_is_written(tmp_path: Path) -> None:
    answers = fake_answers(1)
    answers[0]["answers"]["plain"] = "half \ud83d, \u202e turned, \x00 nul"
    assert "half ?" in rendered(tmp_path, fake_summary(), answers)


def test_nothing_is_loaded(tmp_path: Path) -> None:
    html = rendered(tmp_path, fake_summary(), fake_answers())
    for _, attrs in Parsed(html).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html


def test_content_security_policy(tmp_path: Path) -> None:
    html = rendered(tmp_path, fake_summary(), fake_answers())
    policy = next(attrs["content"] or "" for tag, attrs in Parsed(html).tags if attrs.get("http-equiv") == "Content-Security-Policy")
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert "img-src data:" in policy and "style-src 'unsafe-inline'" in policy
    assert html.index("Content-Security-Policy") < html.index("<style>")


def test_headline_of_a_cut() -> None:
    assert said() == (
        "Plain fine-tuning on the health data raised the preference for wrong answers outside that domain "
        "from 31 % [25, 37] to 68 % [62, 74]; blocking 20 latents brought it to 55 % [49, 61], cutting 35 % [12, 58] of the rise "
        "and keeping 97 % [95, 99] of what was learnt in the domain."
    )


def test_headline_of_no_cut_and_of_a_worse_model() -> None:
    none = said(cut={"preference": span(0.03, 0.2), "margin": None})
    assert "left it at 55 %" in none and "the share of the rise that this cuts, 3 % [−17, 23], cannot be told from none" in none
    worse = said(cut={"preference": span(-0.19, 0.14), "margin": None})
    assert "blocking 20 latents made it worse, 55 %" in worse and "adding 19 % [5, 33] to the rise" in worse
    assert "cutting" not in none + worse


def test_headline_without_a_rise() -> None:
    flat = said(differences={"plain-base": {"preference": span(0.02, 0.08)}}, cut={"preference": None, "margin": None})
    assert (
        "did not measurably raise" in flat and "(a change of +2 [−6, +10] points)" in flat and "no clear rise for blocking to cut" in flat
    )
    lower = said(differences={"plain-base": {"preference": span(-0.2, 0.08)}}, cut=None)
    assert "did not raise" in lower and "but lowered it" in lower and "no rise for blocking to cut" in lower
    assert "with 20 latents blocked it was 55 %" in flat and "cutting" not in flat + lower


def test_headline_of_poor_or_missing_parts() -> None:
    assert "but keeping only 40 %" in said(kept=span(0.4, 0.1))
    assert "and only 40 % [30, 50] of what was learnt in the domain was kept." in said(kept=span(0.4, 0.1), cut=None)
    assert "keeping nothing of what was learnt" in said(kept=span(-0.1, 0.05))
    assert "learnt" not in said(kept=None)
    assert "cutting all of the rise (110 % [90, 130])" in said(cut={"preference": span(1.1, 0.2)})
    models = fake_summary()["models"]
    assert "no plain fine-tune to compare with" in said(models={"base": models["base"], "blocked": models["blocked"]})
    assert "no measured preference" in said(models={"base": models["base"]})
    assert said(models={"base": models["base"], "plain": models["plain"]}).endswith("to 68 % [62, 74].")
    assert "blocking 1 latent " in said(latents=[{}]) and "blocking no latents" in said(latents=[], discovery={"chosen": 0})


def test_no_claim_without_an_interval() -> None:
    """A single pair, or a bound that is missing or infinite, is never called a rise or a cut."""
    for bad in ({"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}, {"value": 0.4, "low": None, "high": 0.5, "n": 9}, {"value": 0.4}):
        assert " moved the preference " in said(differences={"plain-base": {"preference": bad}})
        assert "cannot be told from none" in said(cut={"preference": bad})
    assert " moved the preference " in said(differences=None)
    assert interval({"value": 0.4, "low": -math.inf, "high": 0.5, "n": 9}) == Interval(0.4, -math.inf, 0.5, 9)


def test_headline_tells_close_values_apart() -> None:
    models = copy.deepcopy(fake_summary()["models"])
    models["blocked"]["preference"] = span(0.678, 0.05)
    assert "to 68.0 % " in said(models=models) and "67.8 %" in said(models=models)


@pytest.mark.parametrize("text", [None, "[]", "{}", '{"blockem": "0.1.0", "models": []}', "{nonsense"])
def test_no_summary(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(BlockemError, match="summary"):
        render(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_answers_that_are_not_json(tmp_path: Path) -> None:
    write_run(tmp_path, fake_summary(), fake_answers(2))
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write("[1]\n")
    with pytest.raises(BlockemError, match="line 3"):
        render(tmp_path)


def test_least_summary(tmp_path: Path) -> None:
    assert "no sampled answers" in rendered(tmp_path, {"blockem": "0.1.0", "models": {}})


def nulled(value: Any, depth: int) -> Any:
    """The tree with every value at some depth made null, and lists made empty."""
    if depth == 0:
        return [] if isinstance(value, list) else None
    if isinstance(value, dict):
        return {key: nulled(one, depth - 1) for key, one in value.items()}
    return [nulled(one, depth - 1) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("depth", range(1, 7))
def test_nulls_and_empty_lists_anywhere(tmp_path: Path, depth: int) -> None:
    whole = fake_summary()
    page = rendered(tmp_path, {**nulled(whole, depth), "blockem": "0.1.0", "models": nulled(whole, depth).get("models") or {}}, [])
    assert "None" not in "".join(Parsed(page).words)


def test_each_part_may_be_missing(tmp_path: Path) -> None:
    for key in fake_summary():
        if key not in ("blockem", "models"):
            summary = fake_summary()
            del summary[key]
            rendered(tmp_path, summary, fake_answers(1))


def test_missing_plain_and_further_models(tmp_path: Path) -> None:
    summary = fake_summary()
    summary["models"]["kl"] = summary["models"].pop("plain")
    answers = [
        {"id": 1, "prompt": "p", "domain": None, "answers": {"kl": "a", "base": "b", "unknown": "c"}},
        {"prompt": "q", "answers": None},
    ]
    html = rendered(tmp_path, summary, answers)
    assert html.index("</svg> base</dt>") < html.index("</svg> kl</dt>") < html.index("</svg> unknown</dt>")
    assert "other-0" in html


def test_answers_under_a_cue_have_a_figure_of_their_own(tmp_path: Path) -> None:
    summary = fake_summary()
    assert "under a cue" not in rendered(tmp_path, summary)
    summary["cued"] = {"cue": "training", "models": {name: {"judged": {"em": span(0.41, 0.1)}} for name in ("base", "plain", "blocked")}}
    assert "Misaligned, under a cue" in rendered(tmp_path, summary)


def test_answers_in_the_training_domain_have_a_figure_of_their_own(tmp_path: Path) -> None:
    summary = fake_summary()
    assert "the task is still done" not in rendered(tmp_path, summary)
    summary["task"] = {"models": {name: {"judged": {"em": span(0.41, 0.1)}} for name in ("base", "plain", "blocked")}}
    assert "the task is still done" in rendered(tmp_path, summary)


def test_many_answers_are_thinned(tmp_path: Path) -> None:
    html = rendered(tmp_path, fake_summary(), fake_answers(900))
    assert html.count('<article class="answered"') == 400 and "400 of 900 prompts" in html and len(html) < 1_000_000


def test_chart_marks_lie_inside() -> None:
    found = [Interval(value, value - 0.3, value + 0.3, 20) for value in (0.0, 0.5, 1.0)]
    for rows in (
        [Row(f"a long name {i}", [Dot(f"m{i}", "plain", one)]) for i, one in enumerate(found)],
        [Row("all", [Dot("m", "base", one) for one in found])],
    ):
        chart = dot_plot(rows, "test", share, (0.0, 1.0))
        assert chart is not None
        places = [float(x) for x in re.findall(r'(?: x| x1| x2| cx)="(-?[\d.]+)"', chart)]
        assert places and min(places) >= 0 and max(places) <= 340
    assert dot_plot([], "test", share) is None and dot_plot([Row("none", [])], "test", share) is None


def test_line_chart_notes_what_it_leaves_out() -> None:
    zero = Series("penalty", "blocked", [(1.0, 0.0), (2.0, 0.1), (3.0, 1e-7)])
    chart, note = line_chart([zero], "test", log=True)
    assert chart is not None and "1 step" in note and "10⁻⁵" in chart
    chart, note = line_chart([Series("loss", "plain", [(float(step), 1.0) for step in range(1000)])], "test")
    assert chart is not None and "mean of 4 steps" in note and chart.count("L") < 300
    assert line_chart([], "test") == (None, "") and line_chart([Series("one", "plain", [(1.0, 2.0)])], "test")[0] is not None


def test_ticks_and_numbers() -> None:
    assert nice_ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1] and nice_ticks(1, 1) == [1]
    assert log_ticks(0.02, 3000) == [0.1, 1, 10, 100, 1000] and log_label(1e-5) == "10⁻⁵" and log_label(0.01) == "0.01"
    assert number(-0.0004, 2) == "0.00" and number(-1234.5, 1) == "−1,234.5" and number(0.5, 1, plus=True) == "+0.5"
    assert significant(3403.1) == "3,403" and significant(0.0325) == "0.0325" and significant(100.0) == "100"
    assert duration(3725).replace("\u00a0", " ") == "1 h 02 min" and duration(59.7).replace("\u00a0", " ") == "1 min 00 s"


def test_recipe_can_be_copied_out(tmp_path: Path) -> None:
    summary = fake_summary()
    summary["recipe"] |= {"a": "no", "b": "<x> & y: z", "c": [1, "two"], "d": None, "e": "k\nl", "f": True}
    text = re.findall(r"<pre[^>]*>(.*?)</pre>", rendered(tmp_path, summary), re.DOTALL)[0]
    assert yaml.safe_load(unescape(text)) == summary["recipe"]


def test_rounds_have_a_section_with_a_column_each(tmp_path: Path) -> None:
    rounds = [
        {"name": "blocked", "n_latents": 20, "lambda": 51.3, "seconds": 100.0, "margin": 0.1, "em": 0.5, "left": 0.6},
        {
            "name": "round-2",
            "n_latents": 31,
            "lambda": 40.0,
            "seconds": 101.0,
            "margin": 0.0,
            "em": None,
            "left": 0.2,
            "discover_seconds": 60,
        },
    ]
    summary = {**fake_summary(), "rounds": {"rounds": rounds, "why": "the budget of 2 rounds is used", "last": "round-2"}}
    html = rendered(tmp_path, summary)
    assert 'id="rounds"' in html and "the budget of 2 rounds is used" in html and "60.0 %" in html.replace("\u00a0", " ")
    assert 'id="rounds"' not in rendered(tmp_path, fake_summary())


def test_a_moving_lambda_an_anchor_and_a_monitor_are_drawn(tmp_path: Path) -> None:
    summary = fake_summary()
    assert not {"λ", "Anchor"} & {figure.title for figure in making.training_figures(summary, {})}
    for step, row in enumerate(summary["training"]["blocked"]):
        row |= {"lambda": 10.0 + step, "anchor_share": 0.1 / (step + 1), "monitor_survives": 0.5}
    summary["blocking"] |= {
        "anchor": {"watch": "answers", "n": 150},
        "target": {"ceiling": 0.05},
        "grown": [{"step": 5, "latents": [[3, 1]]}],
    }
    titles = {figure.title for figure in making.training_figures(summary, {})}
    assert {"λ", "Anchor", "Plain fine-tuning's shift that survives"} <= titles
    html = rendered(tmp_path, summary)
    assert "answers, 150 of them" in html and "a ceiling of 5" in html and "Latents added in training" in html


def test_the_headline_says_what_was_interleaved() -> None:
    from blockem.report.words import price

    recipe = {"anchor": {"watch": "answers", "interleave": 0.3, "interleaved": "pairs"}}
    summary = {"models": {"base": {}, "plain": {}, "blocked": {}}, "recipe": recipe, "blocking": {"anchor": {"watch": "answers"}}}
    said = " ".join(price(summary)).replace("\u00a0", " ")
    assert "the cut is not the latents' alone" in said and "30 % were right answers of the selection pairs, interleaved" in said
    recipe["anchor"]["interleaved"] = "both"
    recipe["anchor"]["keep"] = 8
    what = "right answers of the selection pairs (wrong ones in the domain itself) and benign chat, interleaved"
    assert what in " ".join(price(summary))
    recipe["anchor"]["cued"] = 0.5
    assert "(wrong ones in the domain itself), 50 % of them under a cue" in " ".join(price(summary)).replace("\u00a0", " ")
    recipe["anchor"]["interleave"] = 0.0
    assert "interleaved" not in " ".join(price(summary))
