"""NAD with the unlearned model: the teacher starts from the model that RNP has pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rnp.defenses.nad import NAD
from rnp.defenses.rnp import RNP
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.types import DefenseSet
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class NADUnlearned(NAD):
    """The teacher is the model repaired by RNP and then fine-tuned; the student is the given model.

    Where fine-tuning does not remove a backdoor, the teacher of `nad` keeps it, and so does the
    student.

    Drawn at random: what RNP draws, and for teacher and student the same numbers as in `nad`.

    Source: Li et al., ICLR 2021 (NAD), for the distillation; Li et al., ICML 2023 (RNP), for the
    teacher. The combination is ours.
    """

    unlearn: Unlearn = Unlearn(until_collapse=False)
    recover: Recover = Recover()
    prune: Prune = Prune()

    def initial_teacher(
        self, model: nn.Module, defense_set: DefenseSet, *, rng: torch.Generator
    ) -> nn.Module:
        """A copy of `model`, repaired by RNP."""
        method = RNP(unlearn=self.unlearn, recover=self.recover, prune=self.prune)
        return method.repair(model, defense_set, rng=rng).model
