"""The split of the images: disjoint, stratified, and never more than there are."""

import pytest
import torch
import torch.nn.functional as F

from rnp.data.base import Split, interleave
from rnp.errors import UserError


def keys(data) -> set[bytes]:
    """The bytes of the images; noise makes each of them unique."""
    return {image.numpy().tobytes() for image in data.images}


@pytest.mark.parametrize("classes, n", [(2, 20), (4, 40), (7, 70), (10, 500)])
def test_every_run_of_k_has_each_class_once(classes, n, rng):
    labels = torch.arange(n)[torch.randperm(n, generator=rng())] % classes
    order = interleave(labels, classes, rng(1))
    assert order.sort().values.tolist() == list(range(n))
    assert all(len(set(run)) == classes for run in labels[order].view(-1, classes).tolist())


@pytest.mark.parametrize(
    "sizes, off", [((50, 50, 50), 1), ((90, 9, 1), 2), ((30, 20, 10, 5), 2), ((1, 0, 7), 2)]
)
def test_every_beginning_is_stratified(sizes, off, rng):
    """For every n each class has its share of the first n, equal classes to within one image."""
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    share = torch.arange(1, len(labels) + 1).unsqueeze(1) * torch.tensor(sizes) / len(labels)
    for seed in range(5):
        counts = F.one_hot(labels[interleave(labels, len(sizes), rng(seed))], len(sizes)).cumsum(0)
        assert (counts - share).abs().max() < off, f"seed {seed}"


def test_the_generator_decides(rng):
    labels = torch.arange(40) % 4
    assert torch.equal(interleave(labels, 4, rng(1)), interleave(labels, 4, rng(1)))
    assert not torch.equal(interleave(labels, 4, rng(1)), interleave(labels, 4, rng(2)))


@pytest.mark.parametrize("from_pool", [False, True])
def test_defender_and_pool(from_pool, toy_set, rng):
    train = toy_set(60)
    test = toy_set(12, seed=1)
    splits = Split(defense_train=8, defense_val=6, from_pool=from_pool)(train, test, rng=rng())
    optimize = keys(splits.defense.train)
    val = keys(splits.defense.val)
    pool = keys(splits.pool)
    assert (len(optimize), len(val), len(pool)) == (8, 6, 60 if from_pool else 46)
    assert not optimize & val
    shared = (optimize | val) & pool
    assert shared == (optimize | val if from_pool else set())
    assert optimize | val | pool == keys(train)
    assert splits.test is test
    assert splits.defense.train.labels.bincount().tolist() == [2, 2, 2, 2]
    assert set(splits.defense.val.labels.bincount(minlength=4).tolist()) == {1, 2}


def test_images_keep_their_labels(toy_set, rng):
    train = toy_set(40)
    label_of = dict(zip((image.numpy().tobytes() for image in train.images), train.labels.tolist()))
    splits = Split(defense_train=9, defense_val=5)(train, train, rng=rng())
    for part in (splits.pool, splits.defense.train, splits.defense.val):
        assert [label_of[image.numpy().tobytes()] for image in part.images] == part.labels.tolist()
        assert part.classes == train.classes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"defense_train": 0}, "data.defense_train must be at least 1, got 0"),
        ({"defense_val": -3}, "data.defense_val must be at least 1, got -3"),
        (
            {"defense_train": 30, "defense_val": 10},
            "= 40 leaves nothing of 40 training images; ask for fewer",
        ),
        (
            {"defense_train": 30, "defense_val": 11, "from_pool": True},
            "= 41, but there are 40 training images",
        ),
    ],
)
def test_too_much_is_refused(options, message, toy_set, rng):
    with pytest.raises(UserError) as caught:
        Split(**options)(toy_set(40), toy_set(4), rng=rng())
    assert message in str(caught.value)


def test_all_of_the_pool_may_be_borrowed(toy_set, rng):
    split = Split(defense_train=30, defense_val=10, from_pool=True)
    splits = split(toy_set(40), toy_set(4), rng=rng())
    assert len(splits.pool) == 40
