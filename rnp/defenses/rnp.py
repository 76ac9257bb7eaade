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


@dataclass(frozen=True, kw_only=True)
class RNPResult(Repaired):
    """The repaired model, and the result of each of the three steps."""

    unlearned: Unlearned
    recovered: Recovered
    pruned: Pruned


@dataclass(frozen=True, kw_only=True)
class RNP(Defense):
    """Unlearn the model, recover it through neuron masks, prune the neurons whose masks stay low.

    Drawn at random: what unlearning and recovery draw, each from a generator of its own that
    depends on the seed of `rng` alone; the state of `rng` does not change. With `root(seed)` as
    `rng` the result equals that of the stages unlearn, recover and prune with this seed.

    Source: Li et al., ICML 2023, Algorithm 1.
    Differs: as `Unlearn`, `Recover` and `Prune` say.
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
        """Return a pruned copy of `model`; `on_epoch` receives unlearning, then recovery.

        Raises: NonFiniteLossError when a loss stays non-finite; UserError when `model` has no
        neurons to mask.
        """
        unlearned = self.unlearn(
            model, defense_set.train, rng=child(rng, "unlearn"), on_epoch=on_epoch
        )
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
        """Recover and prune `model`, of which `unlearned` is the result of unlearning."""
        recovered = self.recover(
            unlearned.model, defense_set.train, rng=child(rng, "recover"), on_epoch=on_epoch
        )
        pruned = self.prune(model, recovered.mask, defense_set.all)
        return RNPResult(
            model=pruned.model,
            sweep=pruned.sweep,
            chosen=pruned.chosen,
            unlearned=unlearned,
            recovered=recovered,
            pruned=pruned,
        )
