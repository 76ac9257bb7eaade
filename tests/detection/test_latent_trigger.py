"""The label that the smallest shift of the features sends all images to."""

import numpy as np
import pytest
import torch
from planted import CLASSES, TARGET, PlantedFeatures, images, rng
from scipy.optimize import nnls
from torch import nn

from rnp.detection.labels.latent_trigger import LatentTrigger, smallest_shifts
from rnp.errors import UserError


def least_distance(differences, leads):
    """The smallest s with differences @ s >= leads, by Lawson and Hanson's method."""
    system = np.vstack([differences.T, leads[None]])
    wanted = np.zeros(len(system))
    wanted[-1] = 1
    multipliers, _ = nnls(system, wanted)
    residual = system @ multipliers - wanted
    return -residual[:-1] / residual[-1]


@pytest.mark.parametrize("k, d", [(3, 2), (10, 64), (10, 4)])
def test_the_shifts_are_the_smallest(k, d):
    draw = rng(k + d)
    weight = torch.randn(k, d, generator=draw, dtype=torch.float64)
    leads = torch.rand(k, k, generator=draw, dtype=torch.float64).fill_diagonal_(0)
    norms = smallest_shifts(weight, leads, 5000).norm(dim=1).tolist()
    compared = 0
    for c in range(k):
        others = [j for j in range(k) if j != c]
        differences = (weight[c] - weight[others]).numpy()
        expected = least_distance(differences, leads[c, others].numpy())
        # Where a class lies between others, no shift at all leads to it.
        if np.isfinite(expected).all() and (differences @ expected > -1e-9).all():
            assert norms[c] == pytest.approx(np.linalg.norm(expected), rel=5e-3)
            compared += 1
    assert compared >= 3


def test_a_class_that_leads_already_needs_no_shift():
    weight = torch.eye(3, dtype=torch.float64)
    leads = -torch.ones(3, 3, dtype=torch.float64).fill_diagonal_(0)
    assert smallest_shifts(weight, leads, 50).abs().max() == 0


def test_leads_are_those_of_the_other_classes_images():
    logits = torch.tensor([[5.0, 0, 0], [0, 3, 0], [0, 4, 0]])
    leads = LatentTrigger(share=1.0).leads(logits, torch.tensor([0, 1, 1]))
    assert leads.tolist()[0] == [0, 4, 0], "the first image is of class 0 itself"
    assert leads.tolist()[1] == [5, 0, 0]
    assert leads.tolist()[2] == [5, 4, 0]


def test_the_planted_label_is_named():
    """The weight of the corner's feature adds to that of its row."""
    detector = LatentTrigger()
    scores = detector.score(PlantedFeatures(), images(), rng=rng())
    assert detector.verdict(scores).label == TARGET and scores.shape == (CLASSES,)


def test_a_lead_that_can_be_chance_is_no_verdict():
    """The same lead among scores that agree, and among scores that differ."""
    detector = LatentTrigger()
    agree = torch.tensor([0.5, 0.1, 0.1, 0.09, 0.08, 0.1])
    differ = torch.tensor([0.5, 0.1, -0.4, -0.9, 0.0, -1.5])
    assert detector.verdict(agree).label == 0 and detector.verdict(differ).label is None
    assert detector.verdict(agree).margin == detector.verdict(differ).margin


def test_equal_classes_have_no_label():
    model = PlantedFeatures()
    with torch.no_grad():
        model.fc.weight[:, -1] = 0
    detector = LatentTrigger()
    assert detector.verdict(detector.score(model, images(), rng=rng())).label is None


def test_the_scale_of_the_features_does_not_count():
    small, large = PlantedFeatures(), PlantedFeatures()
    with torch.no_grad():
        large.fc.weight.mul_(7)
    detector = LatentTrigger()
    one, other = (detector.score(model, images(), rng=rng()) for model in (small, large))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "model, k, obstacle",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 5)), 5, ""),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 5)), 3, "a linear layer with 3 outputs"),
        (nn.Conv2d(3, 5, 1), 5, "a linear layer with 5 outputs"),
        (nn.Linear(4, 3), 3, "4 classes"),
    ],
)
def test_it_says_what_it_cannot_judge(model, k, obstacle):
    found = LatentTrigger().obstacle(model, k)
    assert obstacle in found if obstacle else not found


def test_a_network_without_a_linear_head_is_refused():
    with pytest.raises(UserError, match="latent_trigger needs a linear layer with 6 outputs"):
        LatentTrigger().score(nn.Conv2d(3, 6, 8), images(), rng=rng())
