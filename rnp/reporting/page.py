"""The report: one HTML file that needs nothing else, made from the files that the stages left."""

from __future__ import annotations

import base64
import math
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from rnp.io.files import atomic_write, read_json
from rnp.params.read import flatten

ORDER = (
    "prepare",
    "benign",
    "poison",
    "train",
    "unlearn",
    "recover",
    "prune",
    "defend",
    "detect",
    "controls",
    "evaluate",
)
PACKAGES = ("rnp", "torch", "torchvision", "numpy", "scipy", "matplotlib", "dvc", "mlflow")
MEASURES = {
    "clean_accuracy": "Clean accuracy (CA)",
    "attack_success_rate": "Attack success rate (ASR)",
    "robust_accuracy": "Robust accuracy (RA)",
    "der": "Defense effectiveness (DER)",
}
WORDS = {
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
}
FIGURES = {  # stage/name -> what is seen, what it says
    "poison/triggers": (
        "Rows of images: clean, triggered, their difference, and as stored in the training set.",
        "The trigger on training images; the difference is amplified five times.",
    ),
    "train/training": ("Loss and accuracy against epochs.", "Training of the backdoored model."),
    "benign/training": ("Loss and accuracy against epochs.", "Training of the benign model."),
    "unlearn/unlearning": (
        (
            "Accuracy on the defense set and class shares of the predictions against steps of the"
            " ascent."
        ),
        (
            "Unlearning: which class takes over while accuracy falls. Gray lines are the other"
            " classes."
        ),
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
        (
            "Clean accuracy and attack success rate on test images against the number of pruned"
            " neurons."
        ),
        (
            "What the defender does not see. The oracle point is chosen with the triggered test"
            " images: nobody who lacks the trigger can find it."
        ),
    ),
    "evaluate/models": (
        "Bars of CA, ASR and RA for every model.",
        "Every model on the same test images.",
    ),
    "detect/triggers": (
        "True and recovered triggers: pattern under its mask, and the mask.",
        (
            "The triggers found for the target class. Of a trigger that touches the whole image,"
            " its effect on one image is shown, around mid-gray."
        ),
    ),
    "detect/roc": (
        "ROC curves of the sample detectors.",
        "Telling triggered images from clean ones.",
    ),
}


def page(reports: Path, params: dict, out: Path, stranger: dict | None = None) -> None:
    """Write to `out` the report on `reports`, a folder per stage; stages that are absent are left
    out.

    `stranger` is what `rnp purify` knows of a model and images that no stage made.

    Raises: UserError when a metrics file is damaged.
    """
    metrics = {stage: read_json(path) for stage, path in found(reports, "metrics.json")}
    runs = {stage: read_json(path) for stage, path in found(reports, "run.json")}
    times = {stage: float(run["seconds"]) for stage, run in runs.items() if "seconds" in run}
    figures: dict[str, list[dict[str, str]]] = {}
    for stage, path in found(reports, "*.png"):
        figures.setdefault(stage, []).append(figure(stage, path))
    said = {
        key: {
            name: with_decision(label)
            for name, label in metrics.get("detect", {}).get(key, {}).items()
        }
        for key in ("labels", "benign_labels")
    }
    text = (
        environment()
        .get_template("report.html.j2")
        .render(
            metrics=metrics,
            figures=figures,
            params=dict(flatten(params)),
            measures=MEASURES,
            numbers={stage: dict(flatten(values)) for stage, values in metrics.items()},
            times=times,
            took=dict(defense_seconds(times)),
            **said,
            verdict=list(verdict(metrics)),
            seed=params.get("seed"),
            versions=dict(versions()),
            audit=stranger,
        )
    )
    with atomic_write(out) as draft:
        draft.write_bytes(text.encode(errors="replace"))


def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "words": label,
        "seconds": seconds,
        "signed": lambda value: f"{value:+.3f}",
    }
    return made


def found(reports: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    """Stage and path of each such file, in the order of the stages; whatever else lies in
    `reports` is passed over.
    """
    for stage in ORDER:
        for path in sorted((reports / stage).rglob(pattern)):
            yield path.parent.relative_to(reports).as_posix(), path


def figure(stage: str, path: Path) -> dict[str, str]:
    alt, caption = FIGURES.get(
        f"{stage}/{path.stem}", (f"Figure {path.stem}.", f"{label(path.stem).capitalize()}.")
    )
    return {
        "src": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
        "alt": alt,
        "caption": caption,
    }


def with_decision(verdict: dict) -> dict:
    return verdict | ({"label": "no decision"} if verdict.get("label") in (None, -1) else {})


def label(key: object) -> str:
    return WORDS.get(str(key), str(key).replace("_", " "))


def number(value: object) -> str:
    """Fractions to three places, small and large numbers to three digits, what is absent as a
    dash.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return (
            "–"
            if math.isnan(value)
            else f"{value:.3f}"
            if value == 0 or 1e-3 <= abs(value) < 100
            else f"{value:.3g}"
        )
    if isinstance(value, list | tuple):
        return ", ".join(number(item) for item in value) or "–"
    return "–" if value is None else str(value)


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else f"{value // 60:.0f} min {value % 60:.0f} s"


def defense_seconds(times: dict[str, float]) -> Iterator[tuple[str, float]]:
    """The time of each defense; that of RNP is the sum of its three stages."""
    if {"unlearn", "recover", "prune"} <= times.keys():
        yield "rnp", times["unlearn"] + times["recover"] + times["prune"]
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
    """What was measured, in sentences: each number with its count and interval, and no word about
    what was not measured.
    """
    scores, pruning = metrics.get("evaluate", {}), metrics.get("prune", {})
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
    yield describe_change(
        "The attack success rate",
        scores,
        "attack_success_rate",
        "n_triggered",
        "triggered test images",
    )
    floor = scores.get("models", {}).get("benign", {}).get("attack_success_rate")
    if floor is not None:
        yield (
            f"A model that was never backdoored sends {floor:.3f} of these images to the target"
            " label."
        )
    yield describe_change(
        "The clean accuracy", scores, "clean_accuracy", "n_clean", "clean test images"
    )


def describe_change(what: str, scores: dict, key: str, count: str, images: str) -> str:
    """`before` is compared with the interval around `after`: a difference that the interval covers
    is called none.
    """
    after, before, interval = (
        scores[key],
        scores.get(f"{key}_before"),
        scores.get("intervals", {}).get(key),
    )
    n = f" on {scores[count]:,} {images}" if count in scores else ""
    measured = f"{after:.3f}{n}" + (
        f" (95\u00a0% interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    )
    if before is None or interval is None:
        return f"{what} is {measured}."
    if interval[0] <= before <= interval[1]:
        return f"{what} shows no change beyond the interval: {before:.3f} before, {measured} after."
    return f"{what} {'fell' if before > after else 'rose'} from {before:.3f} to {measured}."
