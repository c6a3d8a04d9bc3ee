"""Groups of latents, tested together where too few pass alone.

Those that failed stage 2 alone, but for the incoherent ones, are ordered by first-order attribution (by |Δ| where there is none) and cut
into groups of n, so that strong ones are together; a rest of fewer than n stays out. A group is tested and swept like a single latent
whose direction is

    d_g = Σ_{k∈g} s_k d_k / ‖Σ_{k∈g} s_k d_k‖,

so that its edit ±α m d_g has the norm of a single latent's. Signs may be mixed: s_k turns each direction to the side to which fine-tuning
moves it, so raised and lowered latents pull the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockem.discovery.screen import Candidate

SHARED = (
    "best_induce",
    "best_induce_alpha",
    "best_induce_incoherence",
    "best_repair",
    "best_repair_alpha",
    "best_repair_incoherence",
    "strongest_induce_alpha",
    "strongest_repair_alpha",
    "pairs",
)


@dataclass
class Group:
    """Latents that are tested together.

    Attributes:
        members: strongest first.
        unit: what goes through the stages in their place; its `latent` is the group's number, from 1, its sign +1.
    """

    members: list[Candidate]
    unit: Candidate

    def direction(self, directions: dict[int, Tensor]) -> Tensor:
        """d_g, `[d_model]`, unit length, from the members' unit d_k; zero where the members cancel, which moves nothing."""
        total = torch.stack([one.sign * directions[one.latent] for one in self.members]).sum(dim=0)
        return torch.nn.functional.normalize(total, dim=0)

    def tell(self) -> None:
        """Give the members the group's number and fate, and what stage 3 found; each has the group's score divided by its size."""
        number, fate = self.unit.latent, self.unit.fate
        for one in self.members:
            one.group = number
            one.fate = fate.replace(": ", f": group {number} ", 1) if ": " in fate else f"{fate} in group {number}"
            if not math.isnan(self.unit.score):
                one.score = self.unit.score / len(self.members)
                for name in SHARED:
                    setattr(one, name, getattr(self.unit, name))


def groups_of(tested: Sequence[Candidate], kept: Sequence[Candidate], size: int) -> list[Group]:
    """Groups of `size` from those of stage 2 (`tested`) that did not go on (`kept`) and were not incoherent."""
    passed = {one.latent for one in kept}
    failed = [one for one in tested if one.latent not in passed and "incoherent" not in one.fate]
    failed.sort(key=lambda one: -(abs(one.delta) if math.isnan(one.attribution) else one.attribution))
    cut = [failed[start : start + size] for start in range(0, len(failed) - size + 1, size)]
    return [Group(members, Candidate(number, 1, 0.0)) for number, members in enumerate(cut, 1)]


def best_of_both(singles: Sequence[Candidate], groups: Sequence[Group], size: int) -> list[Candidate]:
    """The `size` best of the ranked single latents and the members of ranked groups, with their rank and fate.

    A group is chosen whole or not at all: a part of it has not been tested. Where it does not fit, those after it may.
    """
    some = [[one] for one in singles if one.rank] + [group.members for group in groups if group.unit.rank]
    chosen: list[Candidate] = []
    place = 0
    for members in sorted(some, key=lambda members: -members[0].score):
        fits = len(chosen) + len(members) <= size
        for one in members:
            place += 1
            one.rank = place
            if one.group:
                one.fate = f"chosen in group {one.group}" if fits else f"ranked out: no room for group {one.group} in the top {size}"
            else:
                one.fate = "chosen" if fits else f"ranked out: below the top {size}"
        chosen += members if fits else []
    return chosen


def without_number(fate: str) -> str:
    """A fate as it is counted: which group it was does not matter."""
    return re.sub(r"\bgroup \d+", "a group", fate)
