"""Which images the stage `detect` lets its detectors judge, and what it makes of several
checkpoints.
"""

import pytest
import torch
from torch import nn

from rnp.attacks.base import BlendTrigger
from rnp.detection.candidates import from_test_images, from_training_images
from rnp.detection.run import Detect
from rnp.detection.samples.mean_unlearned_confidence import MeanUnlearnedConfidence
from rnp.detection.samples.unlearned_confidence import UnlearnedConfidence
from rnp.detection.unlearned import ACCURACY_LEVELS, EnsembleAverage, unlearned_for
from rnp.errors import UserError
from rnp.io.models import save_model
from rnp.models.build import Architecture
from rnp.seeds import generator
from rnp.training.predict import predict
from rnp.types import PoisonedSet


def poisoned(pool, real: int, covers: int) -> PoisonedSet:
    """The last images of `pool`, the covers behind the poisoned ones, all black and of class 1."""
    count = real + covers
    positions = torch.arange(len(pool) - count, len(pool))
    return PoisonedSet(
        positions,
        torch.zeros(count, *pool.shape, dtype=torch.uint8),
        torch.ones(count, dtype=torch.int64),
        torch.arange(count) >= real,
        BlendTrigger(torch.zeros(pool.shape), torch.zeros(1, *pool.shape[1:])),
    )


@pytest.mark.parametrize(
    "real, n, bad",
    [
        (100, 200, 53),  # of 380 images without the 20 covers
        (100, 9999, 100),
        (30, 100, 20),
        (5, 100, 5),
    ],
)
def test_training_images_are_drawn_at_the_rate_of_the_set(real, n, bad, toy_set):
    pool, covers = toy_set(400), 20
    them = from_training_images(pool, poisoned(pool, real, covers), 1, n, generator(0, "x"))
    assert (
        len(them.images) == min(n, 380) == len(set(them.places.tolist()))
        and int(them.positives.sum()) == bad
    )
    assert not them.images[them.positives].any() and torch.equal(
        them.images[~them.positives], pool.images[them.places[~them.positives]]
    )
    assert set(them.places.tolist()).isdisjoint(range(400 - covers, 400)), "covers are neither"
    assert them.targets[them.positives].all() and torch.equal(
        them.targets[~them.positives], pool.labels[them.places[~them.positives]] == 1
    )
    again, other = (
        from_training_images(pool, poisoned(pool, real, covers), 1, n, generator(seed, "x"))
        for seed in (0, 1)
    )
    assert torch.equal(again.places, them.places) and not torch.equal(other.places, them.places)


def test_test_images_are_half_triggered(toy_set):
    them = from_test_images(toy_set(40), toy_set(30, seed=1), None, 25)
    assert int(them.positives.sum()) == 25 == len(them.images) // 2 and not them.targets.any(), (
        "all-to-all has no target class"
    )


def test_the_average_is_that_of_confidences(toy_model, toy_set):
    images, members = toy_set(8).images, [toy_model(seed=seed) for seed in range(3)]
    mean = torch.stack([predict(member, images).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(predict(EnsembleAverage(members), images).softmax(1), mean)


def test_the_average_of_members_that_are_certain():
    """A probability of 0 has no logarithm."""
    assert (
        EnsembleAverage([nn.Flatten()])(1e4 * torch.rand(3, 3, 2, 2, generator=generator(0, "x")))
        .isfinite()
        .all()
    )


def test_who_asks_all_checkpoints(tmp_path, rng):
    """A checkpoint that unlearning never reached is the last one."""
    architecture = Architecture(arch="resnet10", width=4)

    def build(seed):
        return architecture.build(4, 3, torch.full((3,), 0.5), torch.ones(3), rng=rng(seed)).eval()

    for seed, level in enumerate((*ACCURACY_LEVELS[:2], "end")):
        save_model(
            tmp_path / f"accuracy_{level}.safetensors", build(seed), architecture, tuple("abcd")
        )
    images = torch.rand(4, 3, 16, 16, generator=rng())
    found, one = (
        predict(unlearned_for(detector, tmp_path, "0.5"), images)
        for detector in (MeanUnlearnedConfidence(), UnlearnedConfidence())
    )
    torch.testing.assert_close(one, predict(build(1), images))
    torch.testing.assert_close(
        found, predict(EnsembleAverage([build(seed) for seed in range(3)]), images)
    )


@pytest.mark.parametrize("n", [-1, 99])
def test_too_few_training_images(n):
    with pytest.raises(
        UserError, match=f"detect.training_images must be 0 or at least 100, got {n}"
    ):
        Detect(num_training_images=n)
