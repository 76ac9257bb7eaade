"""Data sets that need no download: sizes, balance, and the seed decides everything."""

import pytest
import torch

from rnp.data.digits import Digits
from rnp.data.shapes import CLASSES, Shapes, signed_distance
from rnp.errors import UserError

SMALL = [Shapes(train=30, test=20, size=16), Digits(size=16)]


@pytest.fixture(params=SMALL, ids=lambda dataset: dataset.name)
def dataset(request):
    return request.param


def test_the_seed_decides(dataset, tmp_path, rng):
    loaded = (dataset.load(tmp_path, rng=rng(seed)) for seed in (1, 1, 2))
    for seed_1, again, seed_2 in zip(*loaded):
        assert torch.equal(seed_1.images, again.images)
        assert torch.equal(seed_1.labels, again.labels)
        assert not torch.equal(seed_1.images, seed_2.images)
    assert list(tmp_path.iterdir()) == []


def test_balanced_images_of_the_size_asked_for(dataset, tmp_path, rng):
    for part in dataset.load(tmp_path, rng=rng()):
        counts = part.labels.bincount(minlength=10)
        assert part.shape == (3, 16, 16)
        assert len(part.classes) == 10
        assert counts.max() - counts.min() <= 0.1 * counts.max()
        assert part.images.float().std() > 20


def test_sizes(tmp_path, rng):
    assert [len(part) for part in SMALL[0].load(tmp_path, rng=rng())] == [30, 20]
    assert [len(part) for part in SMALL[1].load(tmp_path, rng=rng())] == [1797 - 539, 539]


def test_digits_are_not_shared_between_train_and_test(tmp_path, rng):
    train, test = (
        {image.numpy().tobytes() for image in part.images}
        for part in SMALL[1].load(tmp_path, rng=rng())
    )
    assert not train & test


@pytest.mark.parametrize("name", CLASSES)
def test_outlines_are_closed_and_within_the_circle(name):
    line = torch.linspace(-1.5, 1.5, 31)
    v, u = torch.meshgrid(line, line, indexing="ij")
    distance = signed_distance(name, u, v)
    outside = (u * u + v * v).sqrt() > 1.01
    assert (distance > 0)[outside].all(), "no outline leaves the circle"
    assert 0.03 < (distance < 0).float().mean() < 0.4, "some of the square is inside"


def test_distance_to_a_square_by_hand():
    u = torch.tensor([0.0, 1.0, 1.0, 2.0])
    v = torch.tensor([0.0, 0.0, 1.0, 0.0])
    square = signed_distance("square", u, v)
    assert square.tolist() == pytest.approx([-(0.5**0.5), 0, 0.5**0.5, 1], abs=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Shapes(train=0), "shapes.train must be at least 1, got 0"),
        (lambda: Shapes(test=0), "shapes.test must be at least 1, got 0"),
        (lambda: Shapes(size=4), "shapes.size must be at least 8, got 4"),
        (lambda: Shapes(noise=-1), "shapes.noise must be 0 or more, got -1"),
        (lambda: Digits(test_share=1), "digits.test_share must be in (0, 1), got 1"),
        (lambda: Digits(size=0), "digits.size must be at least 8, got 0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)
