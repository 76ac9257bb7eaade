"""Perturbations are the worst case within the ball; the patches are on top, in every corner."""

import pytest
import torch
from torch import nn

from rnp.attacks.label_consistent import LabelConsistent
from rnp.errors import UserError
from rnp.training.predict import predict
from rnp.types import to_floats


@pytest.mark.parametrize(
    "size, corner", [(3, [[1, 0, 1], [0, 1, 0], [1, 0, 1]]), (2, [[1, 0], [0, 1]])]
)
def test_a_checkerboard_in_every_corner(size, corner, toy_set, rng):
    trigger = LabelConsistent(size=size).make_trigger(toy_set(4), rng=rng())
    gray = torch.full((1, 3, 8, 8), 0.5)
    upper_left = torch.tensor(corner).float()
    expected = gray.clone()
    for _ in range(4):
        expected[..., :size, :size] = upper_left
        expected = expected.rot90(dims=(2, 3))
    for image in (trigger(gray), trigger(gray.flip(3)).flip(3), trigger(gray.flip(2)).flip(2)):
        assert torch.equal(image, expected), "mirrored or not"
    assert trigger.support.sum() == 4 * size**2


def test_a_linear_model_is_driven_to_the_corner_of_the_ball(rng):
    """The loss grows with (w1 - w0) * image: a pixel moves by eps along the sign, within [0, 1]."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    images = torch.rand(5, 3, 8, 8, generator=rng(1))
    for target, sign in ((0, 1), (1, -1)):
        slope = sign * (net[1].weight[1] - net[1].weight[0]).detach().view(3, 8, 8)
        attack = LabelConsistent(eps=0.1, steps=10, step_size=0.03, target_label=target)
        perturbed = attack.perturb(net, images, rng=rng())
        assert torch.allclose(perturbed, (images + 0.1 * slope.sign()).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("steps, reach", [(1, 0.01), (3, 0.03)])
def test_steps_have_their_size(steps, reach, rng):
    """From the same random start, so many steps away from it and no further."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    images = torch.full((4, 3, 4, 4), 0.5)
    attack = LabelConsistent(eps=0.5, steps=steps, step_size=0.01)
    perturbed = attack.perturb(net, images, rng=rng())
    start = torch.rand(images.shape, generator=rng())
    inside = (start > reach) & (start < 1 - reach)
    assert inside.any()
    assert torch.allclose((perturbed - start)[inside].abs(), torch.tensor(reach), atol=1e-6)


def test_a_trained_model_misclassifies_them(trained, toy_set, rng):
    clean = toy_set(80, seed=1)
    images = clean.as_floats()[clean.labels == 2]
    attack = LabelConsistent(eps=0.3, step_size=0.1, target_label=2)
    perturbed = attack.perturb(trained, images, rng=rng())
    before, after = (
        predict(trained, x).argmax(1).eq(2).float().mean() for x in (images, perturbed)
    )
    assert before > 0.9
    assert after < 0.1
    assert (perturbed - images).abs().max() <= 0.3 + 1e-6
    assert perturbed.min() >= 0
    assert perturbed.max() <= 1


def test_patches_are_whole_and_the_rest_within_eps(toy_set, toy_model, rng):
    clean = toy_set(80)
    attack = LabelConsistent(poison_rate=0.1, cover_rate=0.1, target_label=1)
    poisoned = attack.poison(clean, rng=rng(), surrogate=toy_model())
    before = clean.images[poisoned.positions].int()
    after = poisoned.images.int()
    covers = poisoned.covers
    inside = poisoned.trigger.support.expand_as(after)
    whole = (255 * poisoned.trigger.pattern).int().expand_as(after)
    assert torch.equal(after[inside], whole[inside])
    change = (after - before).abs() * ~inside
    assert change[covers].max() == 0, "covers carry the patches alone"
    assert (change[~covers].amax((1, 2, 3)) == 16).all() and covers.sum() == (~covers).sum() == 8
    assert (change[~covers] > 8).float().mean() > 0.3


def test_only_images_of_the_target_class_are_poisoned(toy_set, toy_model, rng):
    clean = toy_set(40)
    attack = LabelConsistent(poison_rate=0.2, target_label=3)
    poisoned = attack.poison(clean, rng=rng(), surrogate=toy_model())
    assert clean.labels[poisoned.positions].tolist() == [3] * 8 == poisoned.labels.tolist()


def test_at_test_only_the_patches(toy_set, toy_model, rng):
    clean = toy_set(40)
    attack = LabelConsistent(poison_rate=0.1)
    trigger = attack.poison(clean, rng=rng(), surrogate=toy_model()).trigger
    images = to_floats(clean.images)
    assert torch.equal(trigger(images)[..., ~trigger.support], images[..., ~trigger.support])


def test_a_model_in_training_mode_can_be_used_and_stays_in_it(toy_set, toy_model, unchanged, rng):
    clean = toy_set(40)
    model = toy_model()
    attack = LabelConsistent(poison_rate=0.1)
    expected = attack.poison(clean, rng=rng(), surrogate=model)
    poisoned = attack.poison(clean, rng=rng(), surrogate=unchanged(model.train()))
    assert torch.equal(poisoned.images, expected.images)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.bn1.training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eps": 16}, r"label_consistent.eps must be in \(0, 1\], got 16; it is a fraction"),
        ({"eps": 0}, r"eps must be in \(0, 1\], got 0$"),
        ({"step_size": 4}, r"step_size must be in \(0, 1\], got 4"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"size": 5}, "four patches of size 5 do not fit 8x8 images"),
        ({"size": 0}, "four patches of size 0 do not fit"),
    ],
)
def test_impossible_settings_are_refused(options, message, toy_set, toy_model, rng):
    with pytest.raises(UserError, match=message):
        LabelConsistent(**options).poison(toy_set(40), rng=rng(), surrogate=toy_model())


def test_it_needs_a_benign_model(toy_set, rng):
    with pytest.raises(UserError, match="label_consistent needs a benign model; pass surrogate="):
        LabelConsistent().poison(toy_set(40), rng=rng())
