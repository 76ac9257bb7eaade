"""The report: one self-contained HTML file, made from the files that the stages left."""

from __future__ import annotations

import base64
import math
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from rnp.io.files import atomic_write, read_json
from rnp.params.read import flatten, params_in_use
from rnp.reporting.stages import PER_IMAGE, RNP_STAGES, STAGES, passes

PACKAGES = ("rnp", "torch", "torchvision", "numpy", "scipy", "matplotlib", "dvc", "mlflow")
MEASURES = {
    "clean_accuracy": "Clean accuracy (CA)",
    "attack_success_rate": "Attack success rate (ASR)",
    "robust_accuracy": "Robust accuracy (RA)",
    "der": "Defense effectiveness (DER)",
}
LABELS = {
    "clean_accuracy": "CA",
    "attack_success_rate": "ASR",
    "robust_accuracy": "RA",
    "der": "DER",
    "clean_accuracy_before": "CA before",
    "attack_success_rate_before": "ASR before",
    "target_class_accuracy": "target class",
    "l1": "size (pixels)",
    "iou": "IoU",
    "iou_top_k": "IoU, top k",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "tpr_at_5_fpr": "TPR at 5 % FPR",
    "fpr": "FPR",
    "fpr_target_class": "FPR on target class",
    "rnp": "RNP",
    "oracle": "oracle (unattainable for a defender)",
    "benign": "benign (never backdoored)",
    "needs_unlearned": "uses the unlearned model",
}
"""Names in words; of all others the underscores become blanks."""
CONTROLS = {
    "benign": (
        "RNP on the benign model, which was never backdoored: the cost of a repair where there is"
        " nothing to repair."
    ),
    "reinfection": (
        "The repaired model, and beside it the benign model, tuned with that many poisoned images"
        " among the defender's. If the benign model learns the backdoor as fast, its return does"
        " not show that something of it was left."
    ),
    "equal_time": (
        "Plain fine-tuning with the same images for as long as RNP took; the number is that of its"
        " steps."
    ),
    "defense_size": "RNP with that many clean images.",
    "distribution_shift": "RNP with darker, noisy images.",
}
"""The control experiments, in the order of the page."""
FIGURES = {
    "poison/triggers": (
        "Rows of images: clean, triggered, their difference, and as stored in the training set.",
        "The trigger on training images; the difference is amplified five times.",
    ),
    "train/training": ("Loss and accuracy against epochs.", "Training of the backdoored model."),
    "benign/training": ("Loss and accuracy against epochs.", "Training of the benign model."),
    "unlearn/unlearning": (
        "Accuracy on the defense set and class shares of the predictions against steps.",
        "Unlearning: which class takes over while accuracy falls. Gray lines: the other classes.",
    ),
    "recover/masks": (
        "Histogram of all masks, and one tick per neuron for each layer.",
        "Recovered masks; neurons with the lowest are pruned first. One tick is one neuron.",
    ),
    "prune/sweep": (
        "Accuracy on the defense set and paired drop against the number of pruned neurons.",
        "What the defender sees, and where the rule stopped.",
    ),
    "evaluate/pruning": (
        "CA and ASR on test images against the number of pruned neurons.",
        "What the defender does not see. The oracle point is chosen with the triggered test images:"
        " it cannot be found without the trigger.",
    ),
    "evaluate/models": (
        "Bars of CA, ASR and RA for every model.",
        "Every model on the same test images.",
    ),
    "detect/triggers": (
        "True and recovered triggers: pattern under its mask, and the mask.",
        "The triggers recovered for the target class. A trigger that covers the whole image is"
        " shown by its effect on one image, around mid-gray.",
    ),
    "detect/roc": (
        "ROC curves of the sample detectors.",
        "Triggered images against clean ones.",
    ),
}
"""By stage and name: the alternative text of a figure, and its caption."""


def page(reports: Path, params: dict, out: Path, audit: dict | None = None) -> None:
    """Write to `out` the report on `reports`, a folder per stage; absent stages are left out.

    `audit` is what `rnp purify` knows about a model and images that no stage made.

    Raises: UserError when a metrics file is damaged.
    """
    metrics = {stage: read_json(path) for stage, path in stage_files(reports, "metrics.json")}
    runs = {stage: read_json(path) for stage, path in stage_files(reports, "run.json")}
    times = {stage: float(run["seconds"]) for stage, run in runs.items() if "seconds" in run}
    figures: dict[str, list[dict[str, str]]] = {}
    for stage, path in stage_files(reports, "*.png"):
        figures.setdefault(stage, []).append(figure(stage, path))
    detection = metrics.get("detect", {})
    template = environment().get_template("report.html.j2")
    text = template.render(
        metrics=metrics,
        figures=figures,
        params=dict(flatten(params_in_use(params))),
        measures=MEASURES,
        controls=CONTROLS,
        numbers={stage: dict(flatten(values)) for stage, values in metrics.items()},
        times=times,
        defense_times=dict(defense_seconds(times)),
        work=dict(stage_passes(runs, metrics.get("unlearn", {}).get(PER_IMAGE, 0))),
        labels=with_decisions(detection.get("labels", {})),
        benign_labels=with_decisions(detection.get("benign_labels", {})),
        verdict=list(verdict(metrics)),
        seed=params.get("seed"),
        versions=dict(versions()),
        audit=audit,
    )
    with atomic_write(out) as draft:
        draft.write_bytes(text.encode(errors="replace"))


def environment() -> Environment:
    """The templates, with their filters."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "number": number,
        "label": label,
        "seconds": seconds,
        "signed": lambda value: f"{value:+.3f}",
    }
    return templates


def stage_files(reports: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    """Stage and path of each such file, in the order of the stages.

    The report itself, and whatever else is in `reports`, are passed over.
    """
    for stage in STAGES:
        for path in sorted((reports / stage).rglob(pattern)) if stage != "report" else ():
            yield path.parent.relative_to(reports).as_posix(), path


def stage_passes(runs: dict[str, dict], per_image: int) -> Iterator[tuple[str, str]]:
    """The passes of an image that each stage has made, and those of RNP, the sum of its three."""
    for stage, run in runs.items():
        yield stage, passes([run], per_image)
    if runs.keys() >= set(RNP_STAGES):
        yield "rnp", passes([runs[stage] for stage in RNP_STAGES], per_image)


def figure(stage: str, path: Path) -> dict[str, str]:
    """What the template needs of a figure."""
    unknown = (f"Figure {path.stem}.", f"{label(path.stem).capitalize()}.")
    alt, caption = FIGURES.get(f"{stage}/{path.stem}", unknown)
    return {
        "src": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
        "alt": alt,
        "caption": caption,
    }


def with_decisions(verdicts: dict[str, dict]) -> dict[str, dict]:
    """The verdicts of label detectors, with words for no label."""
    return {
        name: verdict | ({"label": "no decision"} if verdict.get("label") in (None, -1) else {})
        for name, verdict in verdicts.items()
    }


def label(key: object) -> str:
    """A name in words."""
    return LABELS.get(str(key), str(key).replace("_", " "))


def number(value: object) -> str:
    """Fractions to three places, other numbers to three digits, absent values as a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 100 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(number(item) for item in value) or "–"
    return "–" if value is None else str(value)


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else f"{value // 60:.0f} min {value % 60:.0f} s"


def defense_seconds(times: dict[str, float]) -> Iterator[tuple[str, float]]:
    """The time of each defense; that of RNP is the sum of its three stages."""
    if times.keys() >= set(RNP_STAGES):
        yield "rnp", sum(times[stage] for stage in RNP_STAGES)
    for stage, value in times.items():
        if stage.startswith("defend/"):
            yield stage.removeprefix("defend/"), value


def versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            pass


def verdict(metrics: dict[str, dict]) -> Iterator[str]:
    """What was measured, in sentences: each number with its count and interval."""
    scores = metrics.get("evaluate", {})
    pruning = metrics.get("prune", {})
    if "pruned" in pruning and "lost" in pruning:
        yield (
            f"RNP pruned {number(pruning['pruned'])} of {number(pruning.get('neurons'))} neurons;"
            f" the accuracy on the defender's own images changed by {0 - pruning['lost']:+.3f}."
        )
    if "attack_success_rate" not in scores:
        yield (
            "No triggered image was tested. Whether the model carried a backdoor, and whether it"
            " still carries one, was not measured."
        )
        return
    asr = "attack_success_rate"
    yield describe_change("The attack success rate", scores, asr, "triggered test images")
    floor = scores.get("models", {}).get("benign", {}).get(asr)
    if floor is not None:
        yield (
            f"A model that was never backdoored sends {floor:.3f} of these images to the target"
            " label."
        )
    yield describe_change("The clean accuracy", scores, "clean_accuracy", "clean test images")


def describe_change(what: str, scores: dict, key: str, images: str) -> str:
    """Before and after; a difference within the interval around `after` is called none."""
    after = scores[key]
    before = scores.get(f"{key}_before")
    interval = scores.get("intervals", {}).get(key)
    count = scores.get("n_clean" if key == "clean_accuracy" else "n_triggered")
    measured = f"{after:.3f}"
    if count is not None:
        measured += f" on {count:,} {images}"
    if interval:
        measured += f" (95\u00a0% interval {interval[0]:.3f} to {interval[1]:.3f})"
    if before is None or interval is None:
        return f"{what} is {measured}."
    if interval[0] <= before <= interval[1]:
        return f"{what} shows no change beyond the interval: {before:.3f} before, {measured} after."
    return f"{what} {'fell' if before > after else 'rose'} from {before:.3f} to {measured}."
