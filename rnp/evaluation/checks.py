"""Checks of the defense set: what a repair cannot be based on, and what a user should know."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import Tensor

from rnp.errors import UserError
from rnp.models.classifier import Classifier
from rnp.training.predict import predict
from rnp.types import DefenseSet, ImageSet, Logits

FEW_IMAGES = 250
"""Fewer images than this left part of a backdoor (results/cifar10-fast/controls.csv)."""
MAX_CONTRADICTED = 0.1
"""Share of images that the model may confidently assign to another class; a choice, not measured.

Models err on a tenth of the images, but seldom with a confidence of `CONFIDENT`.
"""
CONFIDENT = 0.9


def require_usable(defense: DefenseSet, classes: Sequence[str], channels: int) -> None:
    """Check that a model with these classes and input channels can be repaired with the images.

    Raises: UserError when it cannot.
    """
    train = defense.train
    for part in (train, defense.val):
        if not len(part):
            raise UserError("one part of the defense set has no images; make it again")
        if list(part.classes) != list(classes):
            raise UserError(
                f"the defense set has {len(part.classes)} classes ({join_names(part.classes)}),"
                f" the model {len(classes)} ({join_names(classes)}); they must be the same, in the"
                " same order"
            )
        if part.shape != train.shape or part.shape[0] != channels:
            shapes = sorted({str(list(data.shape)) for data in (train, defense.val)})
            raise UserError(
                f"images of the defense set are {' and '.join(shapes)}; the model takes {channels}"
                " channels, and all images must be of one size"
            )
    present = train.labels.unique().tolist()
    if len(present) < 2:
        raise UserError(
            f"all {len(train)} images to optimize on are of class {classes[present[0]]}; a model"
            " that always predicts that class would be right, so give images of every class"
        )


def find_problems(data: ImageSet, logits: Logits) -> Iterator[str]:
    """One sentence per problem; `logits` are the model's outputs for the images."""
    counts = data.labels.bincount(minlength=len(data.classes))
    yield from _label_problems(data, logits, counts)
    absent = [name for name, count in zip(data.classes, counts) if count == 0]
    if absent:
        yield f"no image of class {join_names(absent)}: the cost of the repair there is unknown"
    single = [name for name, count in zip(data.classes, counts) if count == 1]
    if single:
        yield (
            f"only one image of class {join_names(single)}: the cost of the repair there is almost"
            " unknown"
        )
    if len(data) < FEW_IMAGES:
        yield (
            f"{len(data)} images are few: on CIFAR-10 {FEW_IMAGES} were enough to remove a"
            " backdoor, 100 left half of it"
        )


def _label_problems(data: ImageSet, logits: Logits, counts: Tensor) -> Iterator[str]:
    """The first sign that the labels do not fit the model, if there is one."""
    k = len(data.classes)
    chance = 1 / k
    confidence, predicted = logits.softmax(1).max(1)
    correct = predicted == data.labels
    accuracy = correct.float().mean().item()
    if accuracy <= chance + 0.1 * (1 - chance):
        yield (
            f"accuracy on the clean images is {accuracy:.3f}, near chance ({chance:.3f}): check"
            " their labels, their size, the normalization (--mean, --std) and the order of the"
            " classes"
        )
        return
    hits = data.labels[correct].bincount(minlength=k)
    wrong_classes = [
        name
        for name, count, hit in zip(data.classes, counts, hits)
        if count >= 5 and hit <= count / 10
    ]
    if wrong_classes:
        yield (
            f"the model is wrong on nearly all images of class {join_names(wrong_classes)}: check"
            " the labels and the order of the classes"
        )
        return
    contradicted = int((~correct & (confidence >= CONFIDENT)).sum())
    if contradicted > max(MAX_CONTRADICTED * len(data), 1):
        yield (
            f"the model is sure of another class on {contradicted} of {len(data)} images: if"
            " their labels are wrong, the repair removes what is right and keeps what is wrong"
        )


def check_and_warn(model: Classifier, classes: Sequence[str], defense: DefenseSet) -> DefenseSet:
    """`defense`, after a warning on stderr for each problem with it.

    Raises: UserError as `require_usable` does.
    """
    require_usable(defense, classes, model.get_buffer("mean").numel())
    everything = defense.all
    for problem in find_problems(everything, predict(model, everything.images)):
        print(f"warning: {problem}", file=sys.stderr)
    return defense


def join_names(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
