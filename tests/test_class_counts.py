"""The whole method and the label detectors for 2 to 200 classes, on a network made by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnp.attacks.badnets import BadNets
from rnp.attacks.base import backdoored_test_set
from rnp.clock import Clock
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.mm_bd import MMBD
from rnp.detection.labels.neural_cleanse_index import NeuralCleanseIndex
from rnp.detection.labels.neuron_noise import NeuronNoise
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.run import run_label_detectors, skipped_label_detectors
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.evaluation.metrics import defense_effectiveness, score
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.types import ImageSet, to_bytes
from rnp.unlearn import Unlearn

COUNTS = (2, 10, 43, 200)
TARGET = 1


def colors(k):
    """`k` points of the color cube, as far apart as a grid allows."""
    line = torch.linspace(0.1, 0.7, math.ceil(k ** (1 / 3) - 1e-9) if k > 2 else 2)
    return torch.cartesian_prod(line, line, line)[:: 1 if k > 2 else 7][:k]


def colored_images(k, n, rng):
    """Images that have one color per class, with noise."""
    labels = torch.arange(n) % k
    noise = 0.03 * torch.randn(n, 3, 8, 8, generator=rng)
    images = to_bytes(colors(k)[labels][:, :, None, None] + noise)
    return ImageSet(images, labels, tuple(map(str, range(k))))


class Nearest(nn.Module):
    """Predicts the class of the nearest color.

    Channels 3 to 5 are active on white, which the trigger of BadNets has, and lead to the target.
    """

    def __init__(self, k):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, k)
        with torch.no_grad():
            self.conv.weight.copy_(torch.cat([torch.eye(3), torch.ones(3, 3)]).view(6, 3, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.0] * 3 + [-2.8] * 3))
            points = colors(k)
            # A lead of 5 over the next class: more confident models have no gradient left.
            sharpness = 5 / torch.pdist(points).min() ** 2
            self.fc.weight.zero_()
            self.fc.weight[:, :3] = 2 * sharpness * points
            self.fc.weight[TARGET, 3:] = 40 * sharpness
            self.fc.bias.copy_(-sharpness * points.square().sum(1))

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("k", COUNTS)
def test_from_the_backdoored_model_to_the_metrics(k, rng):
    model = Nearest(k).eval()
    clean = colored_images(k, max(40, 2 * k), rng())
    test = colored_images(k, max(40, k), rng(1))
    trigger = BadNets(target_label=TARGET).make_trigger(clean, rng=rng())
    attacked = backdoored_test_set(trigger, test, TARGET)
    before = score(model, test, attacked, TARGET)
    assert before.clean_accuracy.value > 0.99 and before.attack_success_rate.value > 0.99
    assert before.attack_success_rate.n == int((test.labels != TARGET).sum())
    unlearned = Unlearn(lr=0.05, epochs=60, bn_mode="frozen")(model, clean, rng=rng())
    assert unlearned.reached and unlearned.accuracy <= 0.5
    recovered = Recover(steps=20, bn_mode="frozen")(unlearned.model, clean, rng=rng())
    assert [len(value) for value in recovered.mask.values()] == [6]
    pruned = Prune(max_fraction=0.5, max_loss_increase=0.01)(model, recovered.mask, clean)
    after = score(pruned.model, test, attacked, TARGET)
    assert after.clean_accuracy.value >= before.clean_accuracy.value - 0.05
    assert 0 <= defense_effectiveness(before, after) <= 1
    assert after.attack_success_rate.value + after.robust_accuracy.value <= 1
    shares = PredictionDrift().from_trajectory(unlearned.trajectory, k)
    assert shares.shape == (k,) and ((shares >= 0) & (shares <= 1 + 1e-6)).all()


@pytest.mark.parametrize("k", COUNTS)
def test_every_detector_scores_every_class(k, rng):
    model = Nearest(k).eval()
    clean = colored_images(k, max(40, k), rng())
    noise = NeuronNoise(copies=2)
    index = NeuralCleanseIndex()
    margin = MMBD(starts=1, steps=2)
    triggers = NeuralCleanse(steps=2, batch_size=2).recover(model, clean, rng=rng())
    results = [
        (noise, noise.score(model, clean, rng=rng())),
        (index, index.from_triggers(triggers)),
    ]
    if k > 2:
        results.append((margin, margin.score(model, clean, rng=rng())))
    else:
        with pytest.raises(UserError, match="got 2 classes; use prediction_drift"):
            margin.score(model, clean, rng=rng())
    for detector, scores in results:
        assert scores.shape == (k,) and scores.isfinite().all(), detector
        label = detector.verdict(scores).label
        assert label is None or 0 <= label < k


@pytest.mark.parametrize(
    "k, able",
    [(2, set()), (3, {"mm_bd", "mm_bd_unlearned"}), (4, {"mm_bd", "mm_bd_unlearned", "consensus"})],
)
def test_detectors_that_need_more_classes_are_skipped(k, able, rng):
    model = Nearest(k).eval()
    detectors = [
        NeuronNoise(copies=1),
        MMBD(starts=1, steps=1),
        Consensus(margins=MMBD(starts=1, steps=1), noise=NeuronNoise(copies=1)),
    ]
    models = {"backdoored": model, "unlearned": model}
    clean = colored_images(k, 40, rng())
    results = run_label_detectors(detectors, models, {}, [], clean, 0, Clock())
    assert set(results) == {"neuron_noise", "neuron_noise_unlearned"} | able
    skipped = [text.split()[0] for text in skipped_label_detectors(detectors, model, k)]
    assert skipped == [name for name in ("mm_bd", "consensus") if name not in able]
