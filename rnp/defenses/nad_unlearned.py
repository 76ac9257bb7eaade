"""NAD with the unlearned model: the neurons that it exposes are pruned from the teacher before
that is fine-tuned.
"""

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
    """The teacher is what RNP makes of the victim, after the fine-tuning that `nad` gives its
    teacher; the student is the victim.

    Where fine-tuning does not remove a backdoor, the teacher of `nad` has it still, and a student
    of it keeps its own. Teacher and student draw what they draw in `nad`.

    Source: Li et al., ICLR 2021 (NAD), for the distillation; Li et al., ICML 2023 (RNP), for the
    teacher. The union is ours.
    """

    unlearn: Unlearn = Unlearn(until_collapse=False)
    recover: Recover = Recover()
    prune: Prune = Prune()

    def initial_teacher(
        self, model: nn.Module, defense_set: DefenseSet, *, rng: torch.Generator
    ) -> nn.Module:
        method = RNP(unlearn=self.unlearn, recover=self.recover, prune=self.prune)
        return method.repair(model, defense_set, rng=rng).model
