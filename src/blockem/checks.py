"""What can be known of a recipe and its files before any long work: a sentence now instead of after hours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockem import bundled
from blockem.anchoring import task_pairs
from blockem.config import Recipe
from blockem.cues import cued_prompts
from blockem.defence_names import BLOCK_EM, NEEDS_LATENTS
from blockem.defend import check_files
from blockem.errors import BlockemError
from blockem.leakage import check_outside, check_questions, normalised

if TYPE_CHECKING:
    from blockem.session import Session


def needs_latents(recipe: Recipe) -> bool:
    """Whether stages 1 to 3 come before the recipe's defence."""
    return recipe.defence.name in NEEDS_LATENTS and not (recipe.defence.name == BLOCK_EM and recipe.block.directions)


def check_recipe(session: Session, whole: bool = True) -> None:
    """Read every file that the recipe names, and refuse what cannot end well.

    Args:
        whole: all steps will follow, not one stage by hand.

    Raises:
        BlockemError: the first thing that is wrong.
    """
    from blockem.examples import read_chat

    recipe = session.recipe
    data, anchor = recipe.data, recipe.anchor
    for path in (data.train, data.heldout, data.general):
        if path:
            read_chat(path)
    _ = session.data_key
    pairs, prompts = session.selection_pairs(), session.selection_prompts()
    check_questions(data, prompts, pairs, bundled.final_prompts(data.prompts))
    check_files(session)
    if anchor.watch != "none" and anchor.keep and not task_pairs(session):
        raise BlockemError(
            f"anchor.keep holds selection pairs of the training domain, and none is of {data.domain!r}; "
            "give data.pairs with some, or set anchor.keep=0"
        )
    if recipe.evaluate.cue != "none" or anchor.cued:
        cued_prompts(recipe, [])
    if not whole:
        return
    data.check_training_rows()
    if needs_latents(recipe):
        check_outside(pairs, prompts)
    if recipe.defence.name == "caft" and (recipe.defence.strength or 0) > recipe.discover.size:
        raise BlockemError(
            f"defence.strength is {recipe.defence.strength:g}, but discovery chooses {recipe.discover.size} latents at most; "
            "ask CAFT for at most as many, or raise discover.size"
        )


def check_blocks(session: Session) -> None:
    """Refuse a block that the model does not have; loads the model.

    With latents the fit of the SAE is checked first of all, which says the same.
    """
    from blockem.blocking import direction_places

    recipe = session.recipe
    if recipe.defence.name not in (BLOCK_EM, "freeze"):
        return
    if recipe.block.directions:
        direction_places(session)
    elif recipe.defence.name == "freeze":
        session.lm.check_block(max(sae.block for sae in recipe.sae.each))


def notes(session: Session) -> list[str]:
    """What a user should know of the recipe, though nothing is wrong with it."""
    recipe = session.recipe
    data, anchor = recipe.data, recipe.anchor
    found = []
    if all(p.domain != data.domain for p in bundled.evaluation_pairs(data.pairs)):
        found.append(f"no evaluation pair is of {data.domain!r}, so all of them count as outside the training domain")
    if anchor.watch != "none" and anchor.teaches and anchor.keep and data.train:
        source = data.pairs or "the bundled pairs"
        found.append(
            f"anchor.keep={anchor.keep} teaches {len(task_pairs(session))} wrong answers on {data.domain} of {source} beside your rows; "
            "set anchor.keep=0 to leave them out"
        )
    if data.train and data.heldout and (both := _in_both(data.train, data.heldout, data.heldout_rows)):
        found.append(f"{both} of the held-out rows are training rows too: what is measured on them is memory, not the task")
    return found


def _in_both(train: str, heldout: str, most: int) -> int:
    """How many of the held-out rows in use say the same as a training row."""
    from blockem.examples import read_chat

    seen = {tuple((role, normalised(text)) for role, text in row.messages) for row in read_chat(train)}
    return sum(tuple((role, normalised(text)) for role, text in row.messages) in seen for row in read_chat(heldout)[:most])
