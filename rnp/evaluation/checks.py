"""What a defender should know before trusting a repair that rests on certain images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from rnp.errors import UserError
from rnp.models.classifier import Classifier
from rnp.training.predict import predict
from rnp.types import DefenseSet, ImageSet, Logits

FEW_IMAGES = 250  # results/cifar10-fast/controls.csv
MAX_CONTRADICTED, CONFIDENT = (
    0.1,
    0.9,
)  # a choice, not a measurement: models err on a tenth of images, but seldom so surely


def require_usable(defense: DefenseSet, classes: Sequence[str], channels: int) -> None:
    """Raises: UserError when no repair of a model with these classes and input channels can rest
    on the images.
    """
    train, val = defense.train, defense.val
    for part in (train, val):
        if not len(part):
            raise UserError("one part of the defense set holds no images; make it anew")
        if list(part.classes) != list(classes):
            raise UserError(
                f"the defense set has {len(part.classes)} classes ({join_names(part.classes)}), the model"
                f" {len(classes)} ({join_names(classes)}); they must be the same, in the same order"
            )
        if part.shape != train.shape or part.shape[0] != channels:
            raise UserError(
                "images of the defense set are"
                f" {' and '.join(sorted({str(list(p.shape)) for p in (train, val)}))}; the model"
                f" takes {channels} channels, and all images must be of one size"
            )
    shown = train.labels.unique().tolist()
    if len(shown) < 2:
        raise UserError(
            f"all {len(train)} images to optimize on are of class {classes[shown[0]]}; a model that"
            " says that class to anything would do, so give images of every class"
        )


def find_problems(data: ImageSet, logits: Logits) -> Iterator[str]:
    """One sentence per concern; `logits` are what the model answers to the images."""
    k, n = len(data.classes), len(data)
    probability, predicted = logits.softmax(1).max(1)
    right = predicted == data.labels
    accuracy, counts = right.float().mean().item(), data.labels.bincount(minlength=k)
    if accuracy <= 1 / k + 0.1 * (1 - 1 / k):
        yield (
            f"accuracy on the clean images is {accuracy:.3f}, near chance ({1 / k:.3f}): check"
            " their labels, their size, the normalization (--mean, --std) and the order of the"
            " classes"
        )
    else:
        hits = data.labels[right].bincount(minlength=k)
        odd = [
            name
            for name, count, hit in zip(data.classes, counts, hits)
            if count >= 5 and hit <= count / 10
        ]
        if odd:
            yield (
                f"the model is wrong on nearly all images of class {join_names(odd)}: check the labels"
                " and the order of the classes"
            )
        else:
            against = int((~right & (probability >= CONFIDENT)).sum())
            if against > max(MAX_CONTRADICTED * n, 1):
                yield (
                    f"the model is sure of another class on {against} of {n} images: if their"
                    " labels are wrong, the repair unlearns what is right and keeps what is wrong"
                )
    absent = [name for name, count in zip(data.classes, counts) if count == 0]
    if absent:
        yield f"no image of class {join_names(absent)}: what the repair costs there is not measured"
    single = [name for name, count in zip(data.classes, counts) if count == 1]
    if single:
        yield (
            f"one image alone of class {join_names(single)}: what the repair costs there is all but"
            " unmeasured"
        )
    if n < FEW_IMAGES:
        yield (
            f"{n} images are few: on CIFAR-10 {FEW_IMAGES} were enough to remove a backdoor, 100 left half"
            " of it"
        )


def check_and_warn(model: Classifier, classes: Sequence[str], defense: DefenseSet) -> DefenseSet:
    """`defense`, after every concern about it was printed.

    Raises: UserError as `require_usable` does.
    """
    require_usable(defense, classes, len(model.mean.flatten()))
    everything = defense.all
    for concern in find_problems(everything, predict(model, everything.images)):
        click.echo(f"warning: {concern}", err=True)
    return defense


def join_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
