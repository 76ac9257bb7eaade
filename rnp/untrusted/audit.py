"""A stranger's model and a folder of clean images in, a verdict, a repaired model and a report
out.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
from torch import nn

from rnp.cli import prune as prune_stage
from rnp.cli import recover as recover_stage
from rnp.cli import unlearn as unlearn_stage
from rnp.clock import Clock
from rnp.data.base import Split
from rnp.defenses.rnp_ft import RNPFT
from rnp.detection.base import RecoveredTrigger
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.neural_cleanse_index import NeuralCleanseIndex
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.labels.trigger_survival import TriggerSurvival
from rnp.detection.run import Detect, run_label_detectors
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.detection.unlearned import load_checkpoint
from rnp.errors import UserError
from rnp.evaluation.checks import find_problems, require_usable
from rnp.evaluation.metrics import Proportion, paired_interval
from rnp.io.datasets import load_defense_set, save_defense_set
from rnp.io.files import atomic_write, read_json, sha256, write_json, write_text
from rnp.io.history import read_trajectory
from rnp.io.models import load_model, save_model
from rnp.io.tensors import load_mask, save_tensors
from rnp.models.classifier import Classifier
from rnp.params.read import flatten
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.reporting.page import environment, page, versions
from rnp.reporting.plots import recovered_triggers
from rnp.seeds import generator
from rnp.tracking.store import Store, flat, tags, to_metrics
from rnp.training.predict import predict
from rnp.types import DefenseSet, ImageSet
from rnp.types import take_images as pick
from rnp.unlearn import Unlearn
from rnp.untrusted.images import MIN_IMAGES, load_clean_images, map_labels_to_outputs, pseudo_labels
from rnp.untrusted.limits import sanitize
from rnp.untrusted.model import LoadedModel, load_untrusted_model, output_size
from rnp.untrusted.spec import ModelSpec

UNLEARN, RECOVER, PRUNE = (
    Unlearn(),
    Recover(),
    Prune(),
)
SEARCH = NeuralCleanse(steps=100)  # quick enough for a laptop
ROUNDS = RNPFT().tuning_rounds
NOT_TESTED = (
    (
        "Any trigger: nobody showed one, so whether the model carried a backdoor, and whether it"
        " still does, is not measured."
    ),
    "Attackers who know this defense and train against it.",
    "Images of another distribution than those given.",
    "Chance in the repair: it is one run with one seed.",
)


@dataclass(frozen=True)
class AuditCase:
    """A subject in a folder that the stages read: models/backdoored.safetensors, data/defense."""

    adopted: LoadedModel
    defense: DefenseSet
    warnings: list[str]
    notes: dict[str, object]


def purify(
    model: Path | str,
    clean: Path | str,
    out: Path | str,
    *,
    subject: ModelSpec = ModelSpec(),
    seed: int = 0,
    unlearn: Unlearn = UNLEARN,
    recover: Recover = RECOVER,
    prune: Prune = PRUNE,
    search: NeuralCleanse = SEARCH,
    rounds: int = ROUNDS,
    mlflow: bool = False,
    command: str = "",
) -> dict:
    """Repair the model in the file `model` with the images of `clean`; the content of
    `out`/report.json.

    The repair is that of the defense `rnp_ft`: RNP, then at most `rounds` of tuning against the
    triggers left open by pruning. Up to the tuning the stages are those of the pipeline: with a
    defense set that `rnp prepare` wrote, so is the result.

    Raises: UserError when the file is refused or something does not fit.
    """
    return audit(
        Path(model),
        str(clean),
        Path(out),
        subject,
        seed,
        unlearn,
        recover,
        prune,
        search,
        rounds,
        mlflow,
        command,
    )


def inspect(
    model: Path | str,
    clean: Path | str,
    out: Path | str | None = None,
    *,
    subject: ModelSpec = ModelSpec(),
    seed: int = 0,
    unlearn: Unlearn = UNLEARN,
    search: NeuralCleanse = SEARCH,
    mlflow: bool = False,
    command: str = "",
) -> dict:
    """As `purify`, but the model stays as it is; the report is written where there is an `out`."""
    return audit(
        Path(model),
        str(clean),
        Path(out) if out else None,
        subject,
        seed,
        unlearn,
        None,
        None,
        search,
        0,
        mlflow,
        command,
    )


def audit(
    path: Path,
    clean: str,
    out: Path | None,
    subject: ModelSpec,
    seed: int,
    unlearn: Unlearn,
    recover: Recover | None,
    prune: Prune | None,
    search: NeuralCleanse,
    rounds: int,
    mlflow: bool,
    command: str,
) -> dict:
    if rounds < 0:
        raise UserError(f"rounds must be 0 or more, got {rounds}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work, reports = Path(folder), Path(folder) / "reports"
        case = prepare(path, clean, subject, seed, work)
        victim, defense, unlearned = (
            work / "models" / "backdoored.safetensors",
            work / "data" / "defense",
            work / "models" / "unlearned",
        )
        unlearn_stage.unlearn.work(
            unlearn,
            model=victim,
            defense=defense,
            out=unlearned,
            report=reports / "unlearn",
            seed=seed,
        )
        triggers = search.recover(
            case.adopted.model, case.defense.train, rng=generator(seed, "triggers/backdoored")
        )
        found = label_verdicts(case, unlearned, triggers, reports / "detect", seed)
        result = {
            "command": command,
            "seed": seed,
            "seconds": 0.0,
            "warnings": case.warnings,
            "not_tested": NOT_TESTED,
            "inputs": {str(path): case.adopted.converted.input_sha256},
            "outputs": {},
            **case.notes,
            **found,
            "unlearn": read_json(reports / "unlearn" / "metrics.json"),
            "versions": dict(versions()),
            "settings": {
                name: dataclasses.asdict(value)
                for name, value in (
                    ("subject", subject),
                    ("unlearn", unlearn),
                    ("recover", recover),
                    ("prune", prune),
                    ("search", search),
                )
                if value
            }
            | {"rounds": rounds},
        }
        if prune:
            recovered, pruned = work / "models" / "recovered", work / "models" / "pruned"
            recover_stage.recover.work(
                recover,
                unlearned=unlearned,
                defense=defense,
                out=recovered,
                report=reports / "recover",
                seed=seed,
            )
            prune_stage.prune.work(
                prune,
                model=victim,
                masks=recovered,
                defense=defense,
                out=pruned,
                report=reports / "prune",
            )
            left = load_model(pruned / "model.safetensors")[0]
            repaired, opened = copy.deepcopy(left), []
            if rounds:
                trajectory = read_trajectory(unlearned / "trajectory.csv")
                opened = RNPFT(search=search, tuning_rounds=rounds).fine_tune_against(
                    repaired,
                    triggers,
                    trajectory,
                    case.defense.train,
                    rng=generator(seed, "purify/tune"),
                )[1]
            result |= {
                name: read_json(reports / name / "metrics.json") for name in ("recover", "prune")
            }
            result |= {
                "accuracy_after": accuracy_with_interval(repaired, case.defense.all),
                "cost": held_out_cost(case, recovered, prune, left, repaired),
            }
            result["tuned_against"] = [case.defense.train.classes[label] for label in opened]
            export(out, case, repaired, recovered / "mask.csv")
        result["seconds"] = round(time.perf_counter() - start, 1)
        if out:
            write_reports(out, result, reports)
        if mlflow:
            log_to_mlflow(result, reports, out)
        return result


def prepare(path: Path, clean: str, subject: ModelSpec, seed: int, work: Path) -> AuditCase:
    """Read the model and the images, check that they fit each other, and lay both where the stages
    look for them.
    """
    adopted = load_untrusted_model(
        path,
        arch=subject.arch,
        width=subject.width,
        mean=subject.numbers("mean"),
        std=subject.numbers("std"),
    )
    side = subject.side(adopted.architecture.arch)
    ready = (Path(clean) / "train" / "meta.json").is_file()
    if ready:
        defense, skipped, run_label_detectors = load_defense_set(Path(clean)), [], True
        names, k = defense.train.classes, output_size(adopted.model, defense.train.shape[1])
        if len(names) != k:
            raise UserError(f"{clean} has {len(names)} classes, the model {k} outputs")
        side = defense.train.shape[1]
    else:
        k = output_size(adopted.model, side)
        found = load_clean_images(
            clean, size=side, limit=subject.images, rng=generator(seed, "purify/images")
        )
        labels, names = map_labels_to_outputs(found, subject.names() or adopted.classes, k)
        images, skipped, run_label_detectors = found.images, found.skipped, labels is not None
        if labels is None:
            sure, labels = pseudo_labels(adopted.model, images, subject.confidence)
            images = pick(images, sure)
        if len(labels) < MIN_IMAGES:
            raise UserError(
                f"{clean} gives {len(labels)} usable images, at least {MIN_IMAGES} are needed"
                + (f"; {len(skipped)} were skipped, such as {skipped[0]}" if skipped else "")
            )
        half = len(labels) // 2
        defense = Split(defense_train=half, defense_val=len(labels) - half, from_pool=True)(
            data := ImageSet(images, labels, tuple(names)),
            data,
            rng=generator(seed, "purify/split"),
        ).defense
    require_usable(defense, names, len(adopted.model.mean.flatten()))
    save_model(
        work / "models" / "backdoored.safetensors",
        adopted.model,
        adopted.architecture,
        tuple(names),
    )
    save_defense_set(work / "data" / "defense", defense)
    before = accuracy_with_interval(adopted.model, defense.all)
    warnings = (
        list(find_problems(defense.all, predict(adopted.model, defense.all.images)))
        if run_label_detectors
        else [
            "the images have no labels: those that the model was sure of count as what it said, so"
            " its accuracy on them says nothing, and mistakes of the model are taken for the truth"
        ]
    )
    if skipped:
        warnings.append(
            f"{len(skipped)} files were skipped:"
            f" {'; '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}"
        )
    for warning in warnings:
        click.echo(f"warning: {sanitize(warning)}", err=True)
    converted = adopted.converted
    return AuditCase(
        adopted,
        defense,
        warnings,
        {
            "model": {
                "architecture": adopted.architecture.arch,
                "outputs": k,
                "tensors": converted.tensors,
                "values": converted.elements,
                "found under": converted.key or "no key",
                "prefix removed": converted.prefix or "none",
                "input side": side,
                "mean": adopted.model.mean.flatten().tolist(),
                "std": adopted.model.std.flatten().tolist(),
                "read": describe_isolation(converted.isolation),
                "memory layout": layout(adopted.model),
            },
            "images": {
                "source": clean,
                "optimized on": len(defense.train),
                "chosen with": len(defense.all),
                "labeled": run_label_detectors,
                "skipped": len(skipped),
            },
            "skipped": skipped[:1000],
            "classes": dict(enumerate(names)),
            "accuracy_before": before,
        },
    )


def describe_isolation(granted: dict[str, bool]) -> str:
    """How the file was opened."""
    if not granted:
        return "as data (safetensors)"
    measures = [name for name, done in granted.items() if done] or ["nothing"]
    return f"in a process of its own, limited in {', '.join(measures)}"


def layout(model: Classifier) -> str:
    """In which layout the network runs, and why where it is the slower one."""
    return (
        f"contiguous: {sanitize(model.contiguous_reason)}"
        if model.contiguous_reason
        else "channels last"
    )


def accuracy_with_interval(model: nn.Module, data: ImageSet) -> dict[str, object]:
    right = int((predict(model, data.images).argmax(1) == data.labels).sum())
    found = Proportion(right, len(data))
    return {"value": found.value, "n": found.n, "interval": found.interval()}


def label_verdicts(
    case: AuditCase, unlearned: Path, triggers: list[RecoveredTrigger], report: Path, seed: int
) -> dict:
    """Which label a backdoor would have, by four detectors, and the trigger that comes nearest to
    one for it.
    """
    names = case.defense.train.classes
    nets = {
        "backdoored": case.adopted.model,
        "unlearned": load_checkpoint(unlearned, Detect().trigger_checkpoint),
    }
    said = run_label_detectors(
        [Consensus(), TriggerSurvival(), PredictionDrift(), NeuralCleanseIndex()],
        nets,
        {"backdoored": triggers},
        read_trajectory(unlearned / "trajectory.csv"),
        case.defense.train,
        seed,
        Clock(),
    )
    named = {name: each.verdict for name, each in said.items()}
    smallest = min(triggers, key=lambda trigger: trigger.effective_size)
    label = next(
        (verdict.label for verdict in named.values() if verdict.label is not None), smallest.label
    )
    shown = triggers[label]
    report.mkdir(parents=True, exist_ok=True)
    recovered_triggers(
        report / "triggers.png", None, [(f"class {names[label]}", shown.pattern, shown.mask)]
    )
    found = {
        "labels": {
            name: {
                "label": -1 if verdict.label is None else verdict.label,
                "margin": verdict.margin,
                "class": "" if verdict.label is None else names[verdict.label],
            }
            for name, verdict in named.items()
        },
        "triggers": {
            f"class {names[label]}": {"l1": shown.l1, "success": shown.success, "gain": shown.gain}
        },
    }
    write_json(report / "metrics.json", found)
    return found


def held_out_cost(
    case: AuditCase, recovered: Path, prune: Prune, pruned: nn.Module, repaired: nn.Module
) -> dict:
    """What such a repair costs on images that had no part in it.

    Neurons chosen with one half of the images, accuracy paired on the other half; to that is added
    what the tuning changed there, which saw the first half alone.
    """
    victim, val = case.adopted.model, case.defense.val
    trial = prune(victim, load_mask(recovered / "mask.safetensors"), case.defense.train).model
    one, two, three, four = (
        predict(model, val.images).argmax(1) == val.labels
        for model in (victim, trial, pruned, repaired)
    )
    worse, better = (
        int((a & ~b).sum() + (c & ~d).sum())
        for a, b, c, d in ((one, two, three, four), (two, one, four, three))
    )
    return {
        "value": (worse - better) / len(val),
        "n": len(val),
        "turned_wrong": worse,
        "turned_right": better,
        "interval": paired_interval(worse, better, len(val)),
    }


def export(out: Path, case: AuditCase, repaired: nn.Module, masks: Path) -> None:
    """The repaired weights, under the stranger's own names, and the masks."""
    target, names = out / "purified.safetensors", case.defense.train.classes
    if case.adopted.has_normalization:
        save_model(target, repaired, case.adopted.architecture, names)
    else:
        save_tensors(
            target,
            case.adopted.named(repaired),
            {"kind": "weights", "arch": case.adopted.architecture.arch},
        )
    with atomic_write(out / "masks.csv") as draft:
        draft.write_bytes(masks.read_bytes())


def write_reports(out: Path, result: dict, reports: Path) -> None:
    """The page, the model card and the JSON; the hashes in them are of everything else."""
    out.mkdir(parents=True, exist_ok=True)
    result["outputs"] = {
        file: sha256(out / file)
        for file in ("purified.safetensors", "masks.csv")
        if (out / file).exists()
    }
    page(reports, {}, out / "report.html", audit=result)
    write_json(out / "report.json", result)
    if result["outputs"]:
        write_text(
            out / "modelcard.md",
            environment().get_template("modelcard.md.j2").render(result=result),
        )


def log_to_mlflow(result: dict, reports: Path, out: Path | None) -> None:
    """A run of its own in MLflow, with the numbers, the settings, the figures and the report."""
    store = Store("the report on disk has everything")

    def log() -> None:
        run = store.create(
            "purify",
            tags("purify", "purify", ""),
            dict(flatten(result["settings"])),
            result["seconds"],
        )
        store.log(
            run,
            to_metrics(flat({name: result[name] for name in result if name != "settings"})),
        )
        for stage in sorted(folder for folder in reports.iterdir() if folder.is_dir()):
            store.log_figures(run, stage)
        for file in sorted(out.iterdir()) if out else []:
            store.client.log_artifact(run, str(file))
        store.close(run)

    store.guarded(log)


def summary(result: dict) -> list[str]:
    """The report in a few lines, for the terminal."""
    n = result["accuracy_before"]["n"]
    lines = [
        f"{result['model']['architecture']}, {result['model']['outputs']} outputs; accuracy on {n}"
        f" of your images: {result['accuracy_before']['value']:.3f}"
    ]
    for name, verdict in result["labels"].items():
        said = (
            f"class {verdict['label']} ({verdict['class']})"
            if verdict["label"] >= 0
            else "no decision"
        )
        lines.append(f"label by {name}: {said}, margin {verdict['margin']:.2f}")
    lines.append("a benign model drifts to some class too: a label named is a hint, not a proof")
    if "prune" in result:
        low, high = result["cost"]["interval"]
        against = (
            f", then tuned against triggers of {', '.join(result['tuned_against'])}"
            if result["tuned_against"]
            else ""
        )
        lines.append(
            f"pruned {result['prune']['pruned']} of {result['prune']['neurons']} neurons{against};"
            f" accuracy on images without a part in the choice {-result['held_out_cost']['value']:+.3f} (95"
            f" % interval {-high:+.3f} to {-low:+.3f}, {result['held_out_cost']['n']} images)"
        )
    return lines
