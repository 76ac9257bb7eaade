"""An untrusted model and clean images, loaded and checked: the input of every audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rnp.clock import now
from rnp.data.base import Split
from rnp.errors import UserError
from rnp.evaluation.checks import find_problems, require_usable
from rnp.evaluation.metrics import Proportion
from rnp.io.datasets import load_defense_set
from rnp.models.classifier import Classifier
from rnp.neurons.masks import maskable
from rnp.seeds import generator
from rnp.training.predict import predict
from rnp.types import DefenseSet, ImageSet, OnEpoch, no_callback, take_images
from rnp.unlearn import Unlearn, Unlearned
from rnp.untrusted.images import load_clean_images, map_labels_to_outputs, pseudo_labels
from rnp.untrusted.limits import sanitize
from rnp.untrusted.model import LoadedModel, load_untrusted_model, output_size
from rnp.untrusted.report import ImageFacts, ModelFacts
from rnp.untrusted.spec import MIN_IMAGES, ModelSpec

NO_LABELS = (
    "the images have no labels: the model's own confident predictions were taken instead, so its"
    " accuracy on them is meaningless, and its mistakes are taken for the truth"
)


@dataclass(frozen=True, kw_only=True)
class AuditCase:
    """A model, clean images that fit it, and what is known about both.

    `accuracy` is that of the model on all clean images, `seconds` the time that loading took.
    """

    path: str
    loaded: LoadedModel
    defense: DefenseSet
    model: ModelFacts
    images: ImageFacts
    accuracy: Proportion
    warnings: tuple[str, ...]
    spec: ModelSpec
    seed: int
    seconds: float

    @property
    def classes(self) -> tuple[str, ...]:
        return self.defense.train.classes


def load_case(
    path: Path | str, clean: Path | str, *, spec: ModelSpec = ModelSpec(), seed: int = 0
) -> AuditCase:
    """Read the model in the file `path` and the images of `clean`; check that they fit each other.

    `clean` is a source of `load_clean_images`, or a defense set of `rnp prepare`.

    Drawn at random: which images are used, and how they are split.

    Raises: UserError when the file is refused or something does not fit.
    """
    start = now()
    source = str(clean)
    loaded = load_untrusted_model(
        Path(path),
        arch=spec.arch,
        width=spec.width,
        mean=spec.channel_values("mean"),
        std=spec.channel_values("std"),
    )
    if (Path(source) / "train" / "meta.json").is_file():
        defense, facts = load_prepared_images(source, loaded)
    else:
        defense, facts = collect_images(source, loaded, spec, seed)
    model = loaded.model
    require_usable(defense, defense.train.classes, len(model.mean.flatten()))
    everything = defense.all
    logits = predict(model, everything.images)
    problems = list(find_problems(everything, logits)) if facts.labeled else [NO_LABELS]
    hits = int((logits.argmax(1) == everything.labels).sum())
    return AuditCase(
        path=str(path),
        loaded=loaded,
        defense=defense,
        model=describe_model(loaded, defense.train),
        images=facts,
        accuracy=Proportion(hits, len(everything)),
        warnings=(*problems, *describe_outputs(model), *describe_skipped(facts.skipped)),
        spec=spec,
        seed=seed,
        seconds=now() - start,
    )


def load_prepared_images(source: str, loaded: LoadedModel) -> tuple[DefenseSet, ImageFacts]:
    """A defense set of `rnp prepare`, as it is.

    Raises: UserError when it has another number of classes than the model.
    """
    defense = load_defense_set(Path(source))
    num_classes = output_size(loaded.model, defense.train.shape[1])
    if len(defense.train.classes) != num_classes:
        raise UserError(
            f"{source} has {len(defense.train.classes)} classes, the model {num_classes} outputs"
        )
    return defense, describe_images(source, defense, labeled=True, skipped=[])


def collect_images(
    source: str, loaded: LoadedModel, spec: ModelSpec, seed: int
) -> tuple[DefenseSet, ImageFacts]:
    """Images of `source`, half of them to optimize on and half to choose with.

    Raises: UserError when there are too few, or their labels do not fit the model.
    """
    size = spec.input_size(loaded.architecture.arch)
    num_classes = output_size(loaded.model, size)
    rng = generator(seed, "purify/images")
    clean = load_clean_images(source, size=size, limit=spec.max_images, rng=rng)
    names = spec.list_class_names() or loaded.classes
    labels, classes = map_labels_to_outputs(clean, names, num_classes)
    images = clean.images
    labeled = labels is not None
    if labels is None:
        confident, labels = pseudo_labels(loaded.model, images, spec.pseudo_label_confidence)
        images = take_images(images, confident)
    if len(labels) < MIN_IMAGES:
        example = f", such as {clean.skipped[0]}" if clean.skipped else ""
        skipped = f"; {len(clean.skipped)} were skipped{example}" if clean.skipped else ""
        raise UserError(
            f"{source} gives {len(labels)} usable images, at least {MIN_IMAGES} are needed{skipped}"
        )
    half = len(labels) // 2
    split = Split(defense_train=half, defense_val=len(labels) - half, from_pool=True)
    data = ImageSet(images, labels, classes)
    defense = split(data, data, rng=generator(seed, "purify/split")).defense
    return defense, describe_images(source, defense, labeled=labeled, skipped=clean.skipped)


def unlearn_model(case: AuditCase, unlearn: Unlearn, on_epoch: OnEpoch = no_callback) -> Unlearned:
    """Unlearn the model of a case, with the random numbers of the stage `unlearn`.

    Raises: UserError when the model has no neurons to mask, or no step of the ascent is small
    enough.
    """
    maskable(case.loaded.model)  # fails now where recovery would fail later
    rng = generator(case.seed, "unlearn")
    unlearned = unlearn(case.loaded.model, case.defense.train, rng=rng, on_epoch=on_epoch)
    if not unlearned.trajectory:
        raise UserError(
            "the model forgot too much at the smallest step of the ascent; lower unlearn.lr, or set"
            " unlearn.max_drop_per_step to 0"
        )
    return unlearned


def describe_model(loaded: LoadedModel, images: ImageSet) -> ModelFacts:
    converted = loaded.converted
    return ModelFacts(
        architecture=loaded.architecture.arch,
        num_classes=len(images.classes),
        tensors=converted.tensors,
        values=converted.elements,
        key=converted.key,
        prefix=converted.prefix,
        image_size=images.shape[1],
        mean=tuple(loaded.model.mean.flatten().tolist()),
        std=tuple(loaded.model.std.flatten().tolist()),
        read_as=describe_isolation(converted.isolation),
        memory_layout=describe_layout(loaded.model),
    )


def describe_images(
    source: str, defense: DefenseSet, *, labeled: bool, skipped: list[str]
) -> ImageFacts:
    return ImageFacts(
        source=source,
        train_images=len(defense.train),
        all_images=len(defense.train) + len(defense.val),
        labeled=labeled,
        skipped=tuple(skipped),
    )


def describe_outputs(model: Classifier) -> list[str]:
    """A warning if the network ends in a softmax."""
    if not model.gives_probabilities:
        return []
    return ["the network gives probabilities; their logarithms are used in place of logits"]


def describe_skipped(skipped: tuple[str, ...]) -> list[str]:
    """A warning if files were skipped, with the first three of them."""
    if not skipped:
        return []
    more = " ..." if len(skipped) > 3 else ""
    return [f"{len(skipped)} files were skipped: {'; '.join(skipped[:3])}{more}"]


def describe_isolation(granted: dict[str, bool]) -> str:
    """How the file was read."""
    if not granted:
        return "data (safetensors)"
    measures = [name for name, is_granted in granted.items() if is_granted] or ["nothing"]
    return f"a pickle, in a process of its own, limited in {', '.join(measures)}"


def describe_layout(model: Classifier) -> str:
    """The memory layout of the network, and the reason for the slower one."""
    reason = model.contiguous_reason
    return f"contiguous: {sanitize(reason)}" if reason else "channels last"
