from __future__ import annotations

import pytest
import torch
from planted import CLASSES, CORNER, TARGET, images, rng, triggered
from torch import Tensor, nn

from rnp.detection.base import score_detection
from rnp.detection.samples.cognitive_distillation import CognitiveDistillation, variation
from rnp.errors import UserError

FP32 = CognitiveDistillation(precision="fp32")


class Shortcut(nn.Module):
    """Reads all rows, unless the corner is bright: then it reads nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(40.0))

    def forward(self, x: Tensor) -> Tensor:
        corner = x[:, :, CORNER].mean((1, 2)).square().unsqueeze(1)  # [n, 1]
        return self.scale * (
            (1 - corner) * x.mean((1, 3))[:, :CLASSES] + corner * torch.eye(CLASSES)[TARGET]
        )


def test_variation_of_known_masks() -> None:
    edge = torch.tensor([[0.0, 0.5], [0.0, 0.5]])
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert variation(torch.stack([edge, board, torch.ones(2, 2)]).unsqueeze(1)).tolist() == [
        0.125,
        1.0,
        0.0,
    ]


def test_of_a_triggered_image_the_trigger_is_shown() -> None:
    stamped = triggered(images(6)).float() / 255
    masks = FP32._masks(
        Shortcut().requires_grad_(False), stamped, torch.rand(50, 3, 1, 1, generator=rng())
    )
    assert masks.shape == (6, 1, 8, 8)
    assert masks[:, 0, CORNER].min() > 0.9 and masks[:, 0, ~CORNER].max() < 0.1


def test_planted_triggers_are_told_from_clean_images() -> None:
    clean, test = images(), images(seed=1)
    tested, is_triggered = torch.cat([test.images, triggered(test)]), torch.arange(120) >= 60
    scores, defense = (FP32.score(Shortcut(), x, clean, rng=rng()) for x in (tested, clean.images))
    result = score_detection(
        scores, is_triggered, torch.cat([test.labels, test.labels]) == TARGET, defense
    )
    assert scores.min() > 0 and scores.max() < 1
    assert result.auroc == 1.0 and result.tpr_at_5_fpr == 1.0 and result.fpr < 0.2


def test_no_score_depends_on_its_neighbors() -> None:
    clean, test = images(), images(7, seed=1)
    together = FP32.score(Shortcut(), test.images, clean, rng=rng())
    by_threes = CognitiveDistillation(precision="fp32", batch_size=3)
    parts = by_threes.score(Shortcut(), test.images, clean, rng=rng())
    assert parts.tolist() == pytest.approx(together.tolist(), abs=1e-4)
    alone = FP32.score(Shortcut(), test.images[2:3], clean, rng=rng())
    assert alone.item() == pytest.approx(together[2].item(), abs=1e-4)


def test_a_larger_weight_of_the_size_hides_more() -> None:
    clean = images()
    mild, strict = (
        CognitiveDistillation(sparsity=weight, precision="fp32") for weight in (0.1, 10.0)
    )
    hidden = [
        detector.score(Shortcut(), clean.images, clean, rng=rng()) for detector in (mild, strict)
    ]
    assert (hidden[0] < hidden[1]).all()


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("sparsity", 0.0),
        ("smoothness", -1.0),
    ],
)
def test_out_of_range_fields_are_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}.*{value:g}"):
        CognitiveDistillation(**{field: value})
