"""Images of the target class approach the features of triggered ones, within `epsilon`."""

import pytest
import torch
from torch import nn

from rnp.attacks.base import other_classes
from rnp.attacks.feature_collision import FeatureCollision
from rnp.errors import UserError
from rnp.models.features import features
from rnp.types import to_floats


def test_features_that_are_the_pixels_give_the_nearest_point_of_the_ball(toy_set, rng):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    bases = toy_set(6, seed=1).as_floats()
    sources = toy_set(6, seed=2).as_floats().flip(0)
    epsilon = 0.1
    near = FeatureCollision(epsilon=epsilon, steps=200).collide(model, bases, sources)
    assert torch.allclose(near, sources.clamp(bases - epsilon, bases + epsilon), atol=5e-3)
    assert (bases - sources).abs().max() > 2 * epsilon, "some sources are outside the ball"


def test_features_come_near_those_of_triggered_images(toy_set, trained, rng):
    clean = toy_set(80)
    attack = FeatureCollision(poison_rate=0.1, target_label=1, epsilon=32 / 255)
    poisoned = attack.poison(clean, rng=rng(), surrogate=trained)
    triggered = poisoned.trigger(other_classes(clean, 1).as_floats())
    with torch.no_grad():
        wanted, _ = features(trained, triggered)
        before, _ = features(trained, to_floats(clean.images[poisoned.positions]))
        after, _ = features(trained, to_floats(poisoned.images))

    def distance(from_features):
        return torch.cdist(from_features, wanted).min(1).values.mean()

    assert distance(after) < distance(before) / 2


@pytest.mark.parametrize("epsilon", [4, 16])
def test_pixels_change_a_little_and_labels_do_not(epsilon, toy_set, trained, rng):
    clean = toy_set(40)
    attack = FeatureCollision(poison_rate=0.2, target_label=1, epsilon=epsilon / 255)
    poisoned = attack.poison(clean, rng=rng(), surrogate=trained)
    change = (poisoned.images.int() - clean.images[poisoned.positions].int()).abs()
    assert clean.labels[poisoned.positions].tolist() == [1] * 8 == poisoned.labels.tolist()
    assert change.max() == epsilon
    assert (change > 0).flatten(1).any(1).all()


def test_an_image_does_not_depend_on_the_others_of_its_batch(toy_set, trained):
    bases = toy_set(6, seed=1).as_floats()
    sources = toy_set(6, seed=2).as_floats().flip(0)
    attack = FeatureCollision(steps=10)
    pairs = zip(bases.split(1), sources.split(1))
    alone = torch.cat([attack.collide(trained, base, source) for base, source in pairs])
    assert (attack.collide(trained, bases, sources) - alone).abs().mean() < 1e-3


def test_covers_show_the_checkerboard(toy_set, trained, rng):
    clean = toy_set(40)
    attack = FeatureCollision(poison_rate=0.1, cover_rate=0.2)
    poisoned = attack.poison(clean, rng=rng(), surrogate=trained)
    corner = poisoned.images[poisoned.covers][:, :, 3:, 3:]
    line = torch.arange(5)
    checkerboard = ((line + line[:, None]) % 2 == 0).byte() * 255
    assert len(corner) == 8
    assert torch.equal(corner, checkerboard.expand_as(corner))


def test_it_needs_a_benign_model(toy_set, rng):
    with pytest.raises(UserError, match="feature_collision needs a benign model; pass surrogate="):
        FeatureCollision(poison_rate=0.1).poison(toy_set(40), rng=rng())


@pytest.mark.parametrize("options", [{"epsilon": 16}, {"epsilon": 0}, {"steps": 0}, {"lr": -1.0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(UserError, match=f"feature_collision.{next(iter(options))} must be"):
        FeatureCollision(**options)


def test_a_patch_that_does_not_fit_is_refused(toy_set, trained, rng):
    with pytest.raises(UserError, match="does not fit 8x8 images"):
        FeatureCollision(size=9).poison(toy_set(40), rng=rng(), surrogate=trained)
