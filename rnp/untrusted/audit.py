"""Inspect or repair an untrusted model with clean images, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from jaxtyping import Bool
from torch import Tensor, nn

from rnp.clock import now
from rnp.defenses.rnp_rebuild import (
    EVIDENCE,
    RNPRebuild,
    RNPRebuildResult,
    give_verdicts,
    predicted_labels,
)
from rnp.detection.base import RecoveredTrigger
from rnp.detection.labels.neural_cleanse_index import NeuralCleanseIndex
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.labels.trigger_survival import TriggerSurvival
from rnp.detection.run import skipped_label_detectors
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.evaluation.metrics import Proportion
from rnp.models.classifier import Classifier
from rnp.prune import Prune
from rnp.rebuild import Rebuild
from rnp.recover import Recover
from rnp.seeds import generator, root
from rnp.training.predict import accuracy, predict
from rnp.training.work import WorkCounter, count_pass
from rnp.types import ImageSet, OnEpoch, no_callback
from rnp.unlearn import Unlearn, Unlearned
from rnp.untrusted.case import AuditCase, load_case, unlearn_model
from rnp.untrusted.detection import detect_labels, recover_triggers
from rnp.untrusted.report import (
    AuditReport,
    AuditSettings,
    HeldOutCost,
    Repair,
    RepairSettings,
)
from rnp.untrusted.spec import ModelSpec

DEFAULTS = RepairSettings()
DETECTORS = (*EVIDENCE, TriggerSurvival(), PredictionDrift(), NeuralCleanseIndex())
"""The first that reports a label decides which trigger the report shows."""


def purify(
    model: Path | str,
    clean: Path | str,
    *,
    spec: ModelSpec = ModelSpec(),
    seed: int = 0,
    unlearn: Unlearn = DEFAULTS.unlearn,
    recover: Recover = DEFAULTS.recover,
    prune: Prune = DEFAULTS.prune,
    rebuild: Rebuild = DEFAULTS.rebuild,
    search: NeuralCleanse = DEFAULTS.search,
    tuning_rounds: int = DEFAULTS.tuning_rounds,
    out: Path | str | None = None,
) -> AuditReport:
    """Repair the model in a file with clean images; the file itself is not changed.

    The repair is that of the defense `rnp_rebuild`: RNP, then rebuilding from the given model, and
    at most `tuning_rounds` further rounds against variants of the triggers that still work. Up to
    the pruning the result equals that of the pipeline's stages with the same defense set, seed and
    options.

    Args:
        model: A checkpoint (.pt, .pth, .ckpt, .bin, .safetensors), which need not be trusted.
        clean: A folder with a folder per class, a folder of images, a table of path and label,
            `torchvision:NAME`, or a defense set of `rnp prepare`.
        spec: What the files do not state, such as the architecture.
        out: A folder for the files that `rnp purify` writes; without it nothing is written.

    Raises: UserError when the file is refused or something does not fit.
    """
    settings = RepairSettings(
        unlearn=unlearn,
        search=search,
        recover=recover,
        prune=prune,
        rebuild=rebuild,
        tuning_rounds=tuning_rounds,
    )
    return load_and_audit(model, clean, spec, seed, settings, out)


def inspect(
    model: Path | str,
    clean: Path | str,
    *,
    spec: ModelSpec = ModelSpec(),
    seed: int = 0,
    unlearn: Unlearn = DEFAULTS.unlearn,
    search: NeuralCleanse = DEFAULTS.search,
    out: Path | str | None = None,
) -> AuditReport:
    """Examine the model in a file with clean images; the arguments are those of `purify`."""
    settings = AuditSettings(unlearn=unlearn, search=search)
    return load_and_audit(model, clean, spec, seed, settings, out)


def load_and_audit(
    model: Path | str,
    clean: Path | str,
    spec: ModelSpec,
    seed: int,
    settings: AuditSettings,
    out: Path | str | None,
) -> AuditReport:
    """Load the files, run `audit`, and write its results if there is a folder for them."""
    report = audit(load_case(model, clean, spec=spec, seed=seed), settings)
    if out is not None:
        from rnp.untrusted.files import write_reports  # draws figures, which takes a second to load

        write_reports(report, Path(out))
    return report


def audit(case: AuditCase, settings: AuditSettings, on_epoch: OnEpoch = no_callback) -> AuditReport:
    """Examine the model of a case and, with `RepairSettings`, repair a copy of it.

    Drawn at random: what the stages unlearn and recover and the detectors draw, and fine-tuning.
    """
    start = now()
    counters = {"unlearn": WorkCounter(), "detect": WorkCounter()}
    with counters["unlearn"]:
        unlearned = unlearn_model(case, settings.unlearn, on_epoch)
    with counters["detect"]:
        triggers = recover_triggers(case, settings.search)
        scores = detect_labels(case, unlearned, DETECTORS, triggers)
    evidence = give_verdicts(
        {one: scores[one.name].scores for one in EVIDENCE if one.name in scores}
    )
    # First the verdicts that the repair follows.
    labels = evidence | {
        name: of_label.verdict for name, of_label in scores.items() if name not in evidence
    }
    repair = None
    if isinstance(settings, RepairSettings):
        evident = predicted_labels(evidence.values())
        with counters.setdefault("repair", WorkCounter()):
            repair = repair_model(case, settings, unlearned, triggers, evident, on_epoch)
    one = count_pass(case.loaded.model, case.defense.train.images)
    return AuditReport(
        path=case.path,
        loaded=case.loaded,
        model=case.model,
        images=case.images,
        classes=case.classes,
        accuracy=case.accuracy,
        unlearned=unlearned,
        triggers=tuple(triggers),
        labels=labels,
        repair=repair,
        warnings=(*case.warnings, *find_doubts(case, settings, unlearned)),
        spec=case.spec,
        settings=settings,
        seed=case.seed,
        work={step: counter.work(one) for step, counter in counters.items()},
        seconds=round(case.seconds + now() - start, 1),
    )


def find_doubts(case: AuditCase, settings: AuditSettings, unlearned: Unlearned) -> Iterator[str]:
    """A sentence for everything in the audit that did not go as intended."""
    if not unlearned.reached:
        yield (
            f"in unlearning the accuracy never fell to {settings.unlearn.stop_accuracy:g} in"
            f" {len(unlearned.trajectory)} steps, so the least accurate model was used; raise"
            " unlearn.epochs or unlearn.lr"
        )
    yield from skipped_label_detectors(DETECTORS, case.loaded.model, len(case.classes))


def repair_model(
    case: AuditCase,
    settings: RepairSettings,
    unlearned: Unlearned,
    triggers: list[RecoveredTrigger],
    evident: list[int],
    on_epoch: OnEpoch,
) -> Repair:
    """Recover and prune the model, rebuild it against the triggers of the labels `evident`, and
    search for their triggers once more.
    """
    method = RNPRebuild(
        recover=settings.recover,
        prune=settings.prune,
        rebuild=settings.rebuild,
        search=settings.search,
        tuning_rounds=settings.tuning_rounds,
    )
    result = method.repair_from(
        case.loaded.model,
        unlearned,
        triggers,
        evident,
        case.defense,
        rng=root(case.seed),
        on_epoch=on_epoch,
    )
    recovered = result.rnp.recovered
    repaired = cast(Classifier, result.model)  # as the given model is one
    everything = case.defense.all
    rng = generator(case.seed, "triggers/repaired")
    after = settings.search.recover_for(evident, repaired, case.defense.train, rng=rng)
    return Repair(
        model=repaired,
        recovered=recovered,
        recovered_accuracy=accuracy(recovered.model, case.defense.train),
        pruned=result.rnp.pruned,
        rule=settings.prune.rule,
        accuracy=Proportion(int(hits(repaired, everything).sum()), len(everything)),
        cost=held_out_cost(case, settings.rebuild, result),
        triggers_before=tuple(triggers[label] for label in evident),
        triggers_after=tuple(after),
    )


def hits(model: nn.Module, data: ImageSet) -> Bool[Tensor, "n"]:
    """Which images the model classifies as labeled."""
    return predict(model, data.images).argmax(1) == data.labels


def held_out_cost(case: AuditCase, rebuild: Rebuild, repaired: RNPRebuildResult) -> HeldOutCost:
    """The cost in accuracy of such a repair, on images that have no part in it.

    The neurons are pruned and the model is rebuilt once more, with one half of the images, and the
    accuracy is compared on the other half. The triggers were recovered from the first half alone.
    A model that stayed as it was costs nothing.
    """
    if not repaired.is_rebuilt:
        return HeldOutCost(turned_wrong=0, turned_right=0, n=len(case.defense.val))
    given = case.loaded.model
    clean = case.defense.train
    trial = repaired.prune(given, repaired.rnp.recovered.mask, clean)
    rng = generator(case.seed, "purify/cost")
    against = repaired.tuned_against
    rebuilt = rebuild(given, trial.model, trial.neurons, clean, rng=rng, triggers=against)
    hits_before = hits(given, case.defense.val)
    hits_after = hits(rebuilt, case.defense.val)
    return HeldOutCost(
        turned_wrong=int((hits_before & ~hits_after).sum()),
        turned_right=int((~hits_before & hits_after).sum()),
        n=len(case.defense.val),
    )
