"""What a defender should know before trusting a repair that rests on certain images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rnp.types import ImageSet, Labels


def concerns(data: ImageSet, predicted: Labels) -> Iterator[str]:
    """One sentence per concern; `predicted` is what the model takes the images for."""
    k, n = len(data.classes), len(data)
    right = predicted == data.labels
    accuracy, counts = right.float().mean().item(), data.labels.bincount(minlength=k)
    if accuracy <= 1.5 / k + 0.05:
        yield (f"accuracy on the clean images is {accuracy:.3f}, near chance ({1 / k:.3f}): check their labels, their size, the"
               " normalisation (--mean, --std) and the order of the classes")
    else:
        hits = data.labels[right].bincount(minlength=k)
        odd = [name for name, count, hit in zip(data.classes, counts, hits) if count >= 5 and hit <= count / 10]
        if odd:
            yield f"the model is wrong on nearly all images of class {some(odd)}: check the labels and the order of the classes"
    absent = [name for name, count in zip(data.classes, counts) if count == 0]
    if absent:
        yield f"no image of class {some(absent)}: what the repair costs there is not measured"
    single = [name for name, count in zip(data.classes, counts) if count == 1]
    if single:
        yield f"one image alone of class {some(single)}: what the repair costs there is all but unmeasured"
    if n < 50:
        yield f"{n} images are fewer than the 50 that were tried; the choice of neurons will fit them by chance"


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
