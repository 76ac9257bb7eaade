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
from typing import Annotated

import click
from torch import nn

from rnp import tracking
from rnp.cli import prune as prune_stage
from rnp.cli import recover as recover_stage
from rnp.cli import unlearn as unlearn_stage
from rnp.cli.check import leaves
from rnp.cli.concerns import concerns, refuse_unfit
from rnp.cli.detect import Clock, Detect, labelled
from rnp.cli.options import generator
from rnp.cli.report_page import environment, page, versions
from rnp.cli.screening import checkpoint
from rnp.data.base import Split
from rnp.defences.guided import Guided
from rnp.detection.base import RecoveredTrigger
from rnp.detection.labels.agreement import Agreement
from rnp.detection.labels.class_shares import ClassShares
from rnp.detection.labels.neural_cleanse_index import NeuralCleanseIndex
from rnp.detection.labels.trigger_survival import TriggerSurvival
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.io import (
    load_defence_set,
    load_mask,
    load_model,
    read_json,
    read_trajectory,
    save_defence_set,
    save_model,
    save_tensors,
    sha256,
    whole,
    write_json,
    write_text,
)
from rnp.metrics import Share, paired_interval
from rnp.models.classifier import Classifier
from rnp.plots import recovered_triggers
from rnp.prune import Prune
from rnp.quarantine import printable
from rnp.recover import Recover
from rnp.strangers import FEWEST, Adopted, adopt, confident, gather, on_the_head, output_size
from rnp.training import predict
from rnp.types import DefenceSet, ImageSet
from rnp.types import gather as pick
from rnp.unlearn import Unlearn

UNLEARN, RECOVER, PRUNE = (
    Unlearn(precision="auto"),
    Recover(precision="auto"),
    Prune(precision="auto"),
)
SEARCH = NeuralCleanse(steps=100)  # quick enough for a laptop
ROUNDS = Guided().rounds
UNTESTED = (
    (
        "Any trigger: nobody showed one, so whether the model carried a backdoor, and whether it"
        " still does, is not measured."
    ),
    "Attackers who know this defence and train against it.",
    "Images of another distribution than those given.",
    "Chance in the repair: it is one run with one seed.",
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What there is to know about a stranger's model and images, besides the files."""

    arch: Annotated[
        str,
        "architecture: one of ours, torchvision:NAME, timm:NAME, or package.module:function; rnp's"
        " files say it",
    ] = ""
    width: Annotated[
        int,
        "channels of the first stage, of ours; 0 takes the published width, or what the file says",
    ] = 0
    mean: Annotated[
        str,
        "mean of each input channel, in [0, 1], with commas; torchvision's and timm's have"
        " ImageNet's",
    ] = ""
    std: Annotated[str, "deviation of each input channel, with commas"] = ""
    size: Annotated[
        int, "side of the square input, in pixels; 0 takes 32, or 224 for torchvision and timm"
    ] = 0
    classes: Annotated[
        str,
        "names of the outputs in order, with commas or as a file with one a line; else the folders'"
        " names",
    ] = ""
    images: Annotated[
        int, "clean images to use at most: half to optimise on, all to choose with"
    ] = 1000
    confidence: Annotated[
        float,
        "images without labels: the model's own probability above which its answer is taken"
        " for one",
    ] = 0.9

    def __post_init__(self) -> None:
        if self.images < FEWEST:
            raise UserError(f"images must be at least {FEWEST}, got {self.images}")
        if not 0 <= self.confidence < 1:
            raise UserError(f"confidence must be in [0, 1), got {self.confidence:g}")
        for name in ("width", "size"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def side(self, arch: str) -> int:
        return self.size or (224 if ":" in arch else 32)

    def numbers(self, name: str) -> list[float]:
        try:
            return [float(part) for part in getattr(self, name).split(",") if part.strip()]
        except ValueError:
            raise UserError(
                f"--{name} takes numbers with commas between them, got {getattr(self, name)!r}"
            ) from None

    def names(self) -> list[str]:
        """The classes that were typed, or the lines of the file that was."""
        file = Path(self.classes)
        lines = (
            file.read_text().splitlines()
            if self.classes and file.is_file()
            else self.classes.split(",")
        )
        return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class Case:
    """A subject in a folder that the stages read: models/backdoored.safetensors, data/defence."""

    adopted: Adopted
    defence: DefenceSet
    warnings: list[str]
    notes: dict[str, object]


def purify(
    model: Path | str,
    clean: Path | str,
    out: Path | str,
    *,
    subject: Subject = Subject(),
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

    The repair is that of the defence `guided`: RNP, then at most `rounds` of tuning against the
    triggers left open by pruning. Up to the tuning the stages are those of the pipeline: with a
    defence set that `rnp prepare` wrote, so is the result.

    Raises: UserError when the file is refused or something does not fit.
    """
    return examine(
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
    subject: Subject = Subject(),
    seed: int = 0,
    unlearn: Unlearn = UNLEARN,
    search: NeuralCleanse = SEARCH,
    mlflow: bool = False,
    command: str = "",
) -> dict:
    """As `purify`, but the model stays as it is; the report is written where there is an `out`."""
    return examine(
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


def examine(
    path: Path,
    clean: str,
    out: Path | None,
    subject: Subject,
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
        victim, defence, unlearned = (
            work / "models" / "backdoored.safetensors",
            work / "data" / "defence",
            work / "models" / "unlearned",
        )
        unlearn_stage.unlearn.work(
            unlearn,
            model=victim,
            defence=defence,
            out=unlearned,
            report=reports / "unlearn",
            seed=seed,
        )
        triggers = search.recover(
            case.adopted.model, case.defence.train, rng=generator(seed, "triggers/backdoored")
        )
        found = verdicts(case, unlearned, triggers, reports / "detect", seed)
        result = {
            "command": command,
            "seed": seed,
            "seconds": 0.0,
            "warnings": case.warnings,
            "not_tested": UNTESTED,
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
                defence=defence,
                out=recovered,
                report=reports / "recover",
                seed=seed,
            )
            prune_stage.prune.work(
                prune,
                model=victim,
                masks=recovered,
                defence=defence,
                out=pruned,
                report=reports / "prune",
            )
            left = load_model(pruned / "model.safetensors")[0]
            repaired, opened = copy.deepcopy(left), []
            if rounds:
                trajectory = read_trajectory(unlearned / "trajectory.csv")
                opened = Guided(search=search, rounds=rounds).shut(
                    repaired,
                    triggers,
                    trajectory,
                    case.defence.train,
                    rng=generator(seed, "purify/tune"),
                )[1]
            result |= {
                name: read_json(reports / name / "metrics.json") for name in ("recover", "prune")
            }
            result |= {
                "accuracy_after": share(repaired, case.defence.both),
                "cost": cost(case, recovered, prune, left, repaired),
            }
            result["tuned_against"] = [case.defence.train.classes[label] for label in opened]
            export(out, case, repaired, recovered / "mask.csv")
        result["seconds"] = round(time.perf_counter() - start, 1)
        if out:
            finish(out, result, reports)
        if mlflow:
            track(result, reports, out)
        return result


def prepare(path: Path, clean: str, subject: Subject, seed: int, work: Path) -> Case:
    """Read the model and the images, check that they fit each other, and lay both where the stages
    look for them.
    """
    adopted = adopt(
        path,
        arch=subject.arch,
        width=subject.width,
        mean=subject.numbers("mean"),
        std=subject.numbers("std"),
    )
    side = subject.side(adopted.architecture.arch)
    ready = (Path(clean) / "train" / "meta.json").is_file()
    if ready:
        defence, skipped, labelled = load_defence_set(Path(clean)), [], True
        names, k = defence.train.classes, output_size(adopted.model, defence.train.shape[1])
        if len(names) != k:
            raise UserError(f"{clean} has {len(names)} classes, the model {k} outputs")
        side = defence.train.shape[1]
    else:
        k = output_size(adopted.model, side)
        found = gather(clean, size=side, limit=subject.images, rng=generator(seed, "purify/images"))
        labels, names = on_the_head(found, subject.names() or adopted.classes, k)
        images, skipped, labelled = found.images, found.skipped, labels is not None
        if labels is None:
            sure, labels = confident(adopted.model, images, subject.confidence)
            images = pick(images, sure)
        if len(labels) < FEWEST:
            raise UserError(
                f"{clean} gives {len(labels)} usable images, at least {FEWEST} are needed"
                + (f"; {len(skipped)} were skipped, such as {skipped[0]}" if skipped else "")
            )
        half = len(labels) // 2
        defence = Split(defence_train=half, defence_val=len(labels) - half, from_pool=True)(
            data := ImageSet(images, labels, tuple(names)),
            data,
            rng=generator(seed, "purify/split"),
        ).defence
    refuse_unfit(defence, names, len(adopted.model.mean.flatten()))
    save_model(
        work / "models" / "backdoored.safetensors",
        adopted.model,
        adopted.architecture,
        tuple(names),
    )
    save_defence_set(work / "data" / "defence", defence)
    before = share(adopted.model, defence.both)
    warnings = (
        list(concerns(defence.both, predict(adopted.model, defence.both.images)))
        if labelled
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
        click.echo(f"warning: {printable(warning)}", err=True)
    converted = adopted.converted
    return Case(
        adopted,
        defence,
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
                "read": isolation(converted.isolation),
                "memory layout": layout(adopted.model),
            },
            "images": {
                "source": clean,
                "optimised on": len(defence.train),
                "chosen with": len(defence.both),
                "labelled": labelled,
                "skipped": len(skipped),
            },
            "skipped": skipped[:1000],
            "classes": dict(enumerate(names)),
            "accuracy_before": before,
        },
    )


def isolation(granted: dict[str, bool]) -> str:
    """How the file was opened."""
    if not granted:
        return "as data (safetensors)"
    measures = [name for name, done in granted.items() if done] or ["nothing"]
    return f"in a process of its own, limited in {', '.join(measures)}"


def layout(model: Classifier) -> str:
    """In which layout the network runs, and why where it is the slower one."""
    return f"plain: {printable(model.plain_because)}" if model.plain_because else "channels last"


def share(model: nn.Module, data: ImageSet) -> dict[str, object]:
    right = int((predict(model, data.images).argmax(1) == data.labels).sum())
    found = Share(right, len(data))
    return {"value": found.value, "n": found.n, "interval": found.interval()}


def verdicts(
    case: Case, unlearned: Path, triggers: list[RecoveredTrigger], report: Path, seed: int
) -> dict:
    """Which label a backdoor would have, by four detectors, and the trigger that comes nearest to
    one for it.
    """
    names = case.defence.train.classes
    nets = {
        "backdoored": case.adopted.model,
        "unlearned": checkpoint(unlearned, Detect().trigger_model),
    }
    said = labelled(
        [Agreement(), TriggerSurvival(), ClassShares(), NeuralCleanseIndex()],
        nets,
        {"backdoored": triggers},
        read_trajectory(unlearned / "trajectory.csv"),
        case.defence.train,
        seed,
        Clock(),
    )
    named = {name: each.verdict for name, each in said.items()}
    smallest = min(triggers, key=lambda trigger: trigger.size)
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


def cost(case: Case, recovered: Path, prune: Prune, pruned: nn.Module, repaired: nn.Module) -> dict:
    """What such a repair costs on images that had no part in it.

    Neurons chosen with one half of the images, accuracy paired on the other half; to that is added
    what the tuning changed there, which saw the first half alone.
    """
    victim, val = case.adopted.model, case.defence.val
    trial = prune(victim, load_mask(recovered / "mask.safetensors"), case.defence.train).model
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


def export(out: Path, case: Case, repaired: nn.Module, masks: Path) -> None:
    """The repaired weights, under the stranger's own names, and the masks."""
    target, names = out / "purified.safetensors", case.defence.train.classes
    if case.adopted.whole:
        save_model(target, repaired, case.adopted.architecture, names)
    else:
        save_tensors(
            target,
            case.adopted.named(repaired),
            {"kind": "weights", "arch": case.adopted.architecture.arch},
        )
    with whole(out / "masks.csv") as draft:
        draft.write_bytes(masks.read_bytes())


def finish(out: Path, result: dict, reports: Path) -> None:
    """The page, the model card and the JSON; the hashes in them are of everything else."""
    out.mkdir(parents=True, exist_ok=True)
    result["outputs"] = {
        file: sha256(out / file)
        for file in ("purified.safetensors", "masks.csv")
        if (out / file).exists()
    }
    page(reports, {}, out / "report.html", stranger=result)
    write_json(out / "report.json", result)
    if result["outputs"]:
        write_text(
            out / "modelcard.md",
            environment().get_template("modelcard.md.j2").render(result=result),
        )


def track(result: dict, reports: Path, out: Path | None) -> None:
    """A run of its own in MLflow, with the numbers, the settings, the figures and the report."""
    store = tracking.Store("the report on disk has everything")

    def log() -> None:
        run = store.create(
            "purify",
            tracking.tags("purify", "purify", ""),
            dict(leaves(result["settings"])),
            result["seconds"],
        )
        store.log(
            run,
            tracking.points(
                tracking.flat({name: result[name] for name in result if name != "settings"})
            ),
        )
        for stage in sorted(folder for folder in reports.iterdir() if folder.is_dir()):
            store.log_figures(run, stage)
        for file in sorted(out.iterdir()) if out else []:
            store.client.log_artifact(run, str(file))
        store.close(run)

    store.attempt(log)


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
            f" accuracy on images without a part in the choice {-result['cost']['value']:+.3f} (95"
            f" % interval {-high:+.3f} to {-low:+.3f}, {result['cost']['n']} images)"
        )
    return lines
