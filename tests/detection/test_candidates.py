"""The images that sample detectors score, and the unlearned models that they compare with."""

import functools

import pytest
import torch
from torch import nn

from rnp.attacks.base import BlendTrigger
from rnp.detection.candidates import (
    KnownAttack,
    from_test_images,
    from_training_images,
    select_candidates,
)
from rnp.detection.run import Detect
from rnp.detection.samples.mean_unlearned_confidence import MeanUnlearnedConfidence
from rnp.detection.samples.unlearned_confidence import UnlearnedConfidence
from rnp.detection.samples.unlearned_ratio import UnlearnedRatio
from rnp.detection.unlearned import (
    ACCURACY_LEVELS,
    EnsembleAverage,
    load_checkpoint,
    restore_checkpoint,
    unlearned_by_detector,
    unlearned_for,
)
from rnp.errors import UserError
from rnp.io.models import save_model
from rnp.models.build import Architecture
from rnp.seeds import generator
from rnp.training.predict import predict
from rnp.types import PoisonedSet
from rnp.unlearn import Unlearned


def poisoned(pool, real: int, covers: int) -> PoisonedSet:
    """The last images of `pool`, first poisoned ones, then covers, all black and of class 1."""
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
    "real, n, expected",
    [
        (100, 200, 53),  # of 380 images without the 20 covers
        (100, 9999, 100),
        (30, 100, 20),
        (5, 100, 5),
    ],
)
def test_training_images_are_drawn_at_the_rate_of_the_set(real, n, expected, toy_set):
    pool = toy_set(400)
    changes = poisoned(pool, real, covers=20)

    def draw(seed):
        return from_training_images(pool, changes, 1, n, generator(seed, "x"))

    candidates = draw(0)
    triggered, positions = candidates.triggered, candidates.positions
    assert len(candidates.images) == min(n, 380) == len(set(positions.tolist()))
    assert int(triggered.sum()) == expected
    assert not candidates.images[triggered].any()
    assert torch.equal(candidates.images[~triggered], pool.images[positions[~triggered]])
    assert set(positions.tolist()).isdisjoint(range(380, 400)), "covers are neither"
    assert candidates.target_class[triggered].all()
    in_target_class = pool.labels[positions[~triggered]] == 1
    assert torch.equal(candidates.target_class[~triggered], in_target_class)
    assert torch.equal(draw(0).positions, positions)
    assert not torch.equal(draw(1).positions, positions)


def test_test_images_are_half_triggered(toy_set):
    candidates = from_test_images(toy_set(40), toy_set(30, seed=1), None, 25)
    assert int(candidates.triggered.sum()) == 25 == len(candidates.images) // 2
    assert not candidates.target_class.any(), "all-to-all has no target class"


@pytest.mark.parametrize(
    "real, wanted, tasks",
    [
        (30, 100, ["samples", "training_samples"]),
        (30, 0, ["samples"]),
        (0, 100, ["samples"]),  # covers alone are no poisoned images
    ],
)
def test_training_images_are_candidates_where_some_are_poisoned(real, wanted, tasks, toy_set):
    pool = toy_set(200)
    changes = poisoned(pool, real, covers=5)
    attack = KnownAttack(1, changes.trigger, toy_set(40), toy_set(40, seed=1), pool, changes)
    assert list(select_candidates(attack, 20, wanted, seed=0)) == tasks


def test_the_average_is_that_of_confidences(toy_model, toy_set):
    images = toy_set(8).images
    members = [toy_model(seed=seed) for seed in range(3)]
    mean = torch.stack([predict(member, images).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(predict(EnsembleAverage(members), images).softmax(1), mean)


def test_the_average_of_members_with_a_confidence_of_one():
    """A probability of 0 has no logarithm."""
    images = 1e4 * torch.rand(3, 3, 2, 2, generator=generator(0, "x"))
    assert EnsembleAverage([nn.Flatten()])(images).isfinite().all()


@pytest.fixture
def get_checkpoint(request, tmp_path, rng):
    """The checkpoints .8, .5 and the last one, with seeds 0, 1 and 2, from files or from memory."""
    architecture = Architecture(arch="resnet10", width=4)
    levels = (*ACCURACY_LEVELS[:2], "end")

    def build(seed):
        return architecture.build(4, 3, torch.full((3,), 0.5), torch.ones(3), rng=rng(seed)).eval()

    models = {level: build(seed) for seed, level in enumerate(levels)}
    if request.param == "memory":
        states = {level: model.state_dict() for level, model in models.items()}
        unlearned = Unlearned(models["end"], states, [], True, 1, 0.5, 0)
        return functools.partial(restore_checkpoint, build(3).train(), unlearned)
    for level, model in models.items():
        save_model(tmp_path / f"accuracy_{level}.safetensors", model, architecture, tuple("abcd"))
    return functools.partial(load_checkpoint, tmp_path)


@pytest.mark.parametrize("get_checkpoint", ["files", "memory"], indirect=True)
def test_a_level_that_was_not_reached_is_the_last_checkpoint(get_checkpoint, rng):
    images = torch.rand(4, 3, 16, 16, generator=rng())
    expected = [
        Architecture(arch="resnet10", width=4)
        .build(4, 3, torch.full((3,), 0.5), torch.ones(3), rng=rng(seed))
        .eval()
        for seed in range(3)
    ]
    for level, model in zip(ACCURACY_LEVELS, expected, strict=True):
        assert not get_checkpoint(level).training
        torch.testing.assert_close(predict(get_checkpoint(level), images), predict(model, images))
    one = unlearned_for(UnlearnedConfidence(), get_checkpoint, "0.5")
    torch.testing.assert_close(predict(one, images), predict(expected[1], images))
    average = unlearned_for(MeanUnlearnedConfidence(), get_checkpoint, "0.5")
    torch.testing.assert_close(predict(average, images), predict(EnsembleAverage(expected), images))


def test_restoring_a_checkpoint_leaves_the_model(trained, toy_model, unchanged):
    unchanged(trained)
    end = toy_model(seed=7).state_dict()
    unlearned = Unlearned(trained, {"end": end}, [], False, 0, 0.5, 0)
    restored = restore_checkpoint(trained, unlearned, "0.2")
    assert all(torch.equal(value, end[name]) for name, value in restored.state_dict().items())


def test_detectors_share_the_models_that_they_compare_with():
    loaded = []

    def get_checkpoint(level):
        loaded.append(level)
        return nn.Flatten()

    detectors = [UnlearnedConfidence(), UnlearnedRatio(), MeanUnlearnedConfidence()]
    models = unlearned_by_detector(detectors, get_checkpoint, "0.2")
    assert loaded == ["0.2", *ACCURACY_LEVELS]
    assert models["unlearned_confidence"] is models["unlearned_ratio"]
    assert isinstance(models["mean_unlearned_confidence"], EnsembleAverage)


@pytest.mark.parametrize("n", [-1, 99])
def test_too_few_training_images(n):
    message = f"detect.num_training_images must be 0 or at least 100, got {n}"
    with pytest.raises(UserError, match=message):
        Detect(num_training_images=n)
