"""Settings of the target search."""

from __future__ import annotations

from dataclasses import dataclass


SLOTS_ON_CPU = 32
TURNS_PER_SLOT = 2


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search; the defaults are the paper's.

    Args:
        early_stopping (`str`): `"mpes"` or `"none"`.
        extra_steps (`int`): Updates after the target has become most probable.
        steps (`int`): Evaluations of the objective at most; the last one is not followed by an update (as in MEMIT).
        optimizer (`str`): `"normalized"`: steps along the gradient's direction, `lr` times `||h||` long, with
            momentum; `"adam"`: as published.
        lr (`float`): Learning rate.
        weight_decay (`float`): Factor of `||delta|| / ||h||^2`.
        kl_weight (`float`): Factor of the KL divergence on the essence prompt.
        max_norm (`float`): Radius of the ball as a share of `||h||`.
        patience (`int`): With MPES: steps without a gain of `LEAST_GAIN` after which a fact that does not converge is
            given up; 0 for never.
        slots (`int`): Facts searched at the same time; 0 for as many as the memory allows.
        final_weight (`float`): LTI: factor of the divergence from the answers with the fact in context.
        middle_weight (`float`): LTI: the same of the subject's representation at a middle block.
        middle_block (`int`, *optional*): LTI: that block; by default halfway between the edited and the last one.
    """

    early_stopping: str = "mpes"
    extra_steps: int = 1
    steps: int = 25
    optimizer: str = "normalized"
    lr: float = 0.5
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    max_norm: float = 0.75
    patience: int = 4
    slots: int = 0
    final_weight: float = 0.0
    middle_weight: float = 0.0
    middle_block: int | None = None

    @property
    def most_in_group(self) -> int:
        """Facts that are searched as one group at most, see `search_groups`."""
        return TURNS_PER_SLOT * (self.slots or SLOTS_ON_CPU)

    @property
    def infers(self) -> bool:
        """Whether the search needs the model's own answers with the facts in context (LTI)."""
        return self.final_weight > 0 or self.middle_weight > 0
