"""RNP with a fourth step: unlearn, recover, prune, rebuild."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defenses.base import Defense, Repaired
from rnp.defenses.rnp import RNP, RNPResult
from rnp.detection.base import Evidence, LabelDetector, LabelVerdict, RecoveredTrigger
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.latent_trigger import LatentTrigger
from rnp.detection.labels.trigger_size import TriggerSize
from rnp.detection.triggers.neural_cleanse import QUICK, NeuralCleanse
from rnp.detection.variants import VariantSearch
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
    def is_rebuilt(self) -> bool:
        """Whether there was anything to rebuild."""
        return bool(self.rnp.pruned.neurons or self.tuned_against)


EVIDENCE: tuple[LabelDetector, ...] = (Consensus(), LatentTrigger(), TriggerSize())
"""Detectors whose verdict counts as evidence, since they seldom name a class of a benign model."""

UNANIMITY = "unanimity"
"""What reports call the verdict of all three together."""
EvidenceScores = dict[LabelDetector, Float[Tensor, "k"]]
"""One score per class, by each detector that can judge the model."""
MIN_GAIN = 0.05
"""A trigger works if it sends more than this share of the images to its label."""


@dataclass(frozen=True, kw_only=True)
class RNPRebuild(Defense):
    """RNP, which skips no neuron, and then rebuilding against the triggers of evident labels.

    A label is evident if one of three detectors predicts it, or all three rank it first:
    `consensus` looks at the unlearned model, `latent_trigger` at the features of the given one,
    `trigger_size` at its triggers.

    Pruning goes down the ranking until it has cost `prune.max_accuracy_drop` of accuracy on the
    defense set, without an evident label only `cautious_accuracy_drop`. Rebuilding (`Rebuild`)
    gives the accuracy back. The first rebuilding is against the recovered trigger of each evident
    label and its variants (`VariantSearch`). In at most `tuning_rounds` further rounds variants are
    searched for in the model so far; while one still works and is local or small, the model is
    rebuilt against all of them, half of the time against the new ones. Where no label is evident
    and no neuron is pruned, the model stays as it is.

    Drawn at random: what RNP, the detectors, recovering the triggers, their variants and rebuilding
    draw, from generators that depend on the seed of `rng` alone; the state of `rng` does not
    change.

    Source: Li et al., ICML 2023, for RNP; Wang et al., S&P 2019, sections IV and VI.C, for the
    triggers and for training against them; `Rebuild` for the rest. The combination is ours.
    """

    unlearn: Unlearn = GROWING
    recover: Recover = Recover()
    prune: Prune = REBUILDABLE
    rebuild: Rebuild = Rebuild()
    search: NeuralCleanse = QUICK
    variants: VariantSearch = VariantSearch()
    cautious_accuracy_drop: Annotated[
        float,
        Interval(ge=0, lt=1),
        "accuracy that pruning may cost, as a share of the images, without an evident label",
    ] = 0.01
    tuning_rounds: Annotated[
        int, Ge(0), "largest number of rounds of looking for triggers that still work"
    ] = 3

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
        evidence = Evidence(model, triggers, unlearned.model, unlearned.trajectory)
        verdicts = give_verdicts(score_labels(evidence, train, rng=child(rng, "labels")))
        return self.repair_from(
            model,
            unlearned,
            triggers,
            predicted_labels(verdicts.values()),
            defense_set,
            rng=rng,
            on_epoch=on_epoch,
        )

    def repair_from(
        self,
        model: nn.Module,
        unlearned: Unlearned,
        triggers: Sequence[RecoveredTrigger],
        evident: Sequence[int],
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> RNPRebuildResult:
        """Repair `model`, of which `unlearned` is the result of unlearning.

        `triggers` are those of all labels in `model`, in order, and `evident` the labels to act
        against. Variants are searched for with the images of `defense_set.train` alone; the model
        is rebuilt on all.
        """
        prune = self.prune if evident else self.cautious_prune()
        method = RNP(recover=self.recover, prune=prune)
        result = method.repair_from(model, unlearned, defense_set, rng=rng, on_epoch=on_epoch)
        rng = child(rng, "rebuild")
        first = [triggers[label] for label in evident]
        clean = defense_set.all
        neurons = result.pruned.neurons
        if not evident and not neurons:
            return RNPRebuildResult(
                result.model, tuned_labels=[], rnp=result, prune=prune, tuned_against=[]
            )
        known = [*first, *self.search_variants(first, model, defense_set.train, rng)]
        rebuilt = self.rebuild(
            model, result.model, neurons, clean, rng=rng, triggers=known, on_epoch=on_epoch
        )
        for _ in range(self.tuning_rounds if evident else 0):
            found = self.search_variants(first, rebuilt, defense_set.train, rng)
            active = [trigger for trigger in found if is_active(trigger, triggers, evident)]
            if not active:
                break
            repeated = active * math.ceil(len(known) / len(active))  # about half of all
            known += active
            rebuilt = self.rebuild(
                model,
                rebuilt,
                neurons,
                clean,
                rng=rng,
                triggers=[*known, *repeated],
                on_epoch=on_epoch,
            )
        return RNPRebuildResult(
            rebuilt, tuned_labels=list(evident), rnp=result, prune=prune, tuned_against=known
        )

    def search_variants(
        self,
        triggers: Sequence[RecoveredTrigger],
        model: nn.Module,
        clean: ImageSet,
        rng: torch.Generator,
    ) -> list[RecoveredTrigger]:
        """The variants of all `triggers` in `model`."""
        variants = (self.variants(trigger, model, clean, rng=rng) for trigger in triggers)
        return [variant for group in variants for variant in group]

    def cautious_prune(self) -> Prune:
        """`prune`, with the smaller budget."""
        budget = min(self.prune.max_accuracy_drop, self.cautious_accuracy_drop)
        return dataclasses.replace(self.prune, max_accuracy_drop=budget)


def score_labels(evidence: Evidence, clean: ImageSet, *, rng: torch.Generator) -> EvidenceScores:
    """The scores by each of `EVIDENCE`; detectors that cannot judge the model are left out."""
    able = [one for one in EVIDENCE if not one.obstacle(evidence.model, len(clean.classes))]
    return {one: one.score_evidence(evidence, clean, rng=rng) for one in able}


def give_verdicts(scores: EvidenceScores) -> dict[str, LabelVerdict]:
    """The verdict of each detector by its name and, where all could judge, that of all together."""
    verdicts = {one.name: one.verdict(values) for one, values in scores.items()}
    if len(scores) == len(EVIDENCE):
        verdicts[UNANIMITY] = unanimous(scores)
    return verdicts


def unanimous(scores: EvidenceScores) -> LabelVerdict:
    """The label that all of the detectors rank first, each with a score above 0.

    None of them need be sure of it: methods that look at different things seldom agree by chance,
    and `consensus` itself has a score above 0 only where its two parts agree. The margin is the
    smallest of theirs.
    """
    firsts = {int(values.argmax()) for values in scores.values()}
    if len(firsts) > 1 or any(values.max() <= 0 for values in scores.values()):
        return LabelVerdict(None, 0.0)
    margin = min(one.verdict(values).margin for one, values in scores.items())
    return LabelVerdict(firsts.pop(), margin)


def predicted_labels(verdicts: Iterable[LabelVerdict]) -> list[int]:
    """The labels that at least one of `verdicts` predicts, ascending."""
    return sorted({verdict.label for verdict in verdicts if verdict.label is not None})


def is_active(
    trigger: RecoveredTrigger, given: Sequence[RecoveredTrigger], evident: Sequence[int]
) -> bool:
    """Whether `trigger` works and is local, or small for a trigger of this network.

    `given` are the triggers of all labels in the given model. Small is at most half of the median
    of those that are not `evident`: every network has triggers of the usual size.
    """
    others = [one.effective_size for one in given if one.label not in evident]
    usual = statistics.median(others) if others else trigger.mask.numel()
    return trigger.gain > MIN_GAIN and (trigger.is_local or trigger.l1 <= usual / 2)
