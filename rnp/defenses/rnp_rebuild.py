"""RNP with a fourth step: unlearn, recover, prune, rebuild."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import nn

from rnp.defenses.base import Defense, Repaired
from rnp.defenses.rnp import RNP, RNPResult
from rnp.detection.base import RecoveredTrigger, robust_spread
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.prune import Prune
from rnp.rebuild import REBUILDABLE, Rebuild
from rnp.recover import Recover
from rnp.seeds import child
from rnp.types import DefenseSet, ImageSet, OnEpoch, no_callback
from rnp.unlearn import GROWING, Unlearn, Unlearned


@dataclass(frozen=True, kw_only=True)
class RNPRebuildResult(Repaired):
    """The repaired model, and what led to it.

    `rnp` is the result before rebuilding, `prune` the options of its pruning; `tuned_against` are
    the triggers that the rebuilt model has learned to ignore.
    """

    rnp: RNPResult
    prune: Prune
    tuned_against: list[RecoveredTrigger]

    @property
    def tuned_labels(self) -> list[int]:
        """The labels of the triggers that the rebuilt model has learned to ignore."""
        return labels_of(self.tuned_against)


@dataclass(frozen=True)
class Suspicion:
    """What the defender knows before the repair.

    There is evidence against the labels `evident`. A trigger smaller than `small` pixels is
    abnormally small in the given model.
    """

    evident: list[int]
    small: float


@dataclass(frozen=True, kw_only=True)
class RNPRebuild(Defense):
    """RNP, which skips no neuron, and then rebuilding against the triggers of suspected labels.

    Pruning goes down the ranking until it has cost `prune.max_accuracy_drop` of accuracy on the
    defense set, without evidence against any label only `cautious_accuracy_drop`. Rebuilding
    (`Rebuild`) gives the accuracy back.

    There is evidence against a label when `consensus` predicts it, since two detectors agree
    there, or when two others point to it: `prediction_drift` predicts it, and its trigger in the
    given model is abnormally small, below the median by more than `min_index` robust standard
    deviations of the logarithms. Benign networks often have one such trigger, and drift to some
    class; rebuilding against it would cost accuracy for nothing. The first rebuilding is against
    the triggers of the evident labels. In at most `tuning_rounds` further rounds a trigger is
    recovered for each of them from the model so far; while one is still abnormally small for the
    given model, the model is rebuilt against all of them.

    Drawn at random: what RNP, recovering the triggers and rebuilding draw, from generators that
    depend on the seed of `rng` alone; the state of `rng` does not change.

    Source: Li et al., ICML 2023, for RNP and the drift; Wang et al., S&P 2019, sections IV and
    VI.C, for the triggers and the suspected labels; `Rebuild` for the rest. The combination is
    ours.
    """

    unlearn: Unlearn = GROWING
    recover: Recover = Recover()
    prune: Prune = REBUILDABLE
    rebuild: Rebuild = Rebuild()
    search: NeuralCleanse = NeuralCleanse(steps=100)
    min_index: Annotated[float, Ge(0), "anomaly index above which a label is suspicious"] = 2.0
    cautious_accuracy_drop: Annotated[
        float,
        Interval(ge=0, lt=1),
        "accuracy that pruning may cost, as a share of the images, without evidence",
    ] = 0.02
    tuning_rounds: Annotated[
        int, Ge(0), "largest number of rounds of looking for triggers that still work"
    ] = 2

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> RNPRebuildResult:
        """Return a repaired copy of `model`; `on_epoch` receives RNP, then each rebuilding."""
        train = defense_set.train
        unlearned = self.unlearn(model, train, rng=child(rng, "unlearn"), on_epoch=on_epoch)
        triggers = self.search.recover(model, train, rng=child(rng, "triggers"))
        return self.repair_from(model, unlearned, triggers, defense_set, rng=rng, on_epoch=on_epoch)

    def repair_from(
        self,
        model: nn.Module,
        unlearned: Unlearned,
        triggers: Sequence[RecoveredTrigger],
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> RNPRebuildResult:
        """Repair `model`, of which `unlearned` is the result of unlearning.

        `triggers` are those of all labels in `model`, in order. Triggers are recovered from the
        images of `defense_set.train` alone; the model is rebuilt on all.
        """
        suspicion = self.suspect(triggers, unlearned, defense_set.train, rng=child(rng, "labels"))
        prune = self.choose_prune(suspicion)
        method = RNP(recover=self.recover, prune=prune)
        result = method.repair_from(model, unlearned, defense_set, rng=rng, on_epoch=on_epoch)
        rng = child(rng, "rebuild")
        known = [triggers[label] for label in suspicion.evident]
        clean = defense_set.all
        neurons = result.pruned.neurons
        rebuilt = self.rebuild(
            model, result.model, neurons, clean, rng=rng, triggers=known, on_epoch=on_epoch
        )
        for _ in range(self.tuning_rounds if suspicion.evident else 0):
            found = self.search.recover_for(suspicion.evident, rebuilt, defense_set.train, rng=rng)
            active = [trigger for trigger in found if trigger.effective_size < suspicion.small]
            if not active:
                break
            known += active
            rebuilt = self.rebuild(
                model, rebuilt, neurons, clean, rng=rng, triggers=known, on_epoch=on_epoch
            )
        return RNPRebuildResult(rebuilt, rnp=result, prune=prune, tuned_against=known)

    def suspect(
        self,
        triggers: Sequence[RecoveredTrigger],
        unlearned: Unlearned,
        clean: ImageSet,
        *,
        rng: torch.Generator,
    ) -> Suspicion:
        """The labels against which there is evidence.

        `triggers` are those of all labels in the given model, in order.
        """
        small = self.small_size([trigger.effective_size for trigger in triggers])
        abnormal = {trigger.label for trigger in triggers if trigger.effective_size < small}
        detector = PredictionDrift()
        drift = detector.verdict(detector.from_trajectory(unlearned.trajectory, len(triggers)))
        agreed = self.agree(unlearned, clean, rng=rng)
        evident = {label for label in abnormal if label == drift.label} | agreed
        return Suspicion(sorted(evident), small)

    def agree(self, unlearned: Unlearned, clean: ImageSet, *, rng: torch.Generator) -> set[int]:
        """The label that `consensus` predicts, if any."""
        consensus = Consensus()
        if len(clean.classes) < consensus.min_classes:
            return set()
        label = consensus.verdict(consensus.score_unlearned(unlearned.model, clean, rng)).label
        return set() if label is None else {label}

    def small_size(self, sizes: Sequence[float]) -> float:
        """The size below which a trigger is abnormally small."""
        median, deviation = robust_spread(torch.tensor(sizes).log())
        return math.exp(median - self.min_index * deviation)

    def choose_prune(self, suspicion: Suspicion) -> Prune:
        """`prune`, with the smaller budget where there is no evidence."""
        if suspicion.evident:
            return self.prune
        budget = min(self.prune.max_accuracy_drop, self.cautious_accuracy_drop)
        return dataclasses.replace(self.prune, max_accuracy_drop=budget)


def labels_of(triggers: Sequence[RecoveredTrigger]) -> list[int]:
    """Their labels, each once, ascending."""
    return sorted({trigger.label for trigger in triggers})
