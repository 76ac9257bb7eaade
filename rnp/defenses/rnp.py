"""Reconstructive Neuron Pruning: unlearn, recover, prune."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rnp.defenses.base import Defense, Repaired
from rnp.prune import Prune, Pruned
from rnp.recover import Recover, Recovered
from rnp.seeds import child
from rnp.types import DefenseSet, OnEpoch, no_callback
from rnp.unlearn import Unlearn, Unlearned


@dataclass(frozen=True)
class RNPResult(Repaired):
    """The repaired model, with what each of the three steps made."""

    unlearned: Unlearned | None = None
    recovered: Recovered | None = None
    pruned: Pruned | None = None


@dataclass(frozen=True, kw_only=True)
class RNP(Defense):
    """Unlearn the model, recover it by masks alone, prune the neurons whose masks stayed low.

    Drawn at random: what unlearning and recovery draw, each from a generator of its own, which the
    seed of `rng` determines: with a generator of seed s the result is that of the pipeline's three
    stages with `seed: s`, bit for bit.

    Source: Li et al., ICML 2023, Algorithm 1.
    Differs: see `Unlearn`, `Recover` and `Prune`.
    """

    unlearn: Unlearn = Unlearn()
    recover: Recover = Recover()
    prune: Prune = Prune()

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> RNPResult:
        clean = defense_set.train
        unlearned = self.unlearn(model, clean, rng=child(rng, "unlearn"), on_epoch=on_epoch)
        return self.repair_from(model, unlearned, defense_set, rng=rng, on_epoch=on_epoch)

    def repair_from(
        self,
        model: nn.Module,
        unlearned: Unlearned,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> RNPResult:
        """Recover and prune `model`, which has been unlearned already."""
        recovered = self.recover(
            unlearned.model, defense_set.train, rng=child(rng, "recover"), on_epoch=on_epoch
        )
        pruned = self.prune(model, recovered.mask, defense_set.all)
        return RNPResult(
            pruned.model,
            pruned.sweep,
            pruned.chosen,
            unlearned=unlearned,
            recovered=recovered,
            pruned=pruned,
        )
