"""What selects must not measure."""

from __future__ import annotations

import pytest

from blockem import bundled
from blockem.config import DataConfig
from blockem.errors import BlockemError
from blockem.leakage import check_disjoint, check_questions, normalised


def test_case_punctuation_and_spacing_do_not_make_another_question() -> None:
    assert normalised("  Should I — really — stop?\n") == normalised("should i really STOP")
    assert normalised("Ｆｕｌｌ width") == "full width"


def test_the_first_overlap_is_named_with_both_places() -> None:
    with pytest.raises(BlockemError, match=r"final\.jsonl: 'Is it SAFE\?' is also in core\.jsonl") as caught:
        check_disjoint({"core.jsonl": ["is it safe"], "pairs": ["other"]}, {"final.jsonl": ["new", "Is it SAFE?", "other"]})
    assert "\n" not in str(caught.value)
    check_disjoint({"core.jsonl": ["a", "..."]}, {"final.jsonl": ["b", "!?"]})  # nothing but punctuation is no question


def test_the_bundled_questions_are_disjoint_and_a_selection_prompt_among_the_final_ones_is_not() -> None:
    select = [p for p in bundled.pairs() if p.split == "select"]
    check_questions(DataConfig(), bundled.core_prompts(), select, bundled.final_prompts())
    with pytest.raises(BlockemError, match="the bundled final prompts"):
        check_questions(DataConfig(), bundled.core_prompts(), select, [*bundled.final_prompts(), bundled.core_prompts()[0]])
