from __future__ import annotations

import pytest
import torch
from planted import CLASSES, CORNER, TARGET, images, rng, triggered
from torch import Tensor, nn

from rnp.detection.base import score_detection
from rnp.detection.samples.cognitive_distillation import CognitiveDistillation, variation
from rnp.errors import UserError
from rnp.types import to_floats

DETECTOR = CognitiveDistillation()


class Shortcut(nn.Module):
    """Classifies by the rows of the image, or by the corner alone where that is bright."""

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
    masks = torch.stack([edge, board, torch.ones(2, 2)]).unsqueeze(1)
    assert variation(masks).tolist() == [0.125, 1.0, 0.0]


def test_of_a_triggered_image_the_trigger_is_shown() -> None:
    network = Shortcut().requires_grad_(False)
    colors = torch.rand(50, 3, 1, 1, generator=rng())
    masks = DETECTOR._optimize_masks(network, to_floats(triggered(images(6))), colors)
    assert masks.shape == (6, 1, 8, 8)
    assert masks[:, 0, CORNER].min() > 0.9 and masks[:, 0, ~CORNER].max() < 0.1


def score(detector: CognitiveDistillation, candidates: Tensor) -> Tensor:
    return detector.score(Shortcut(), candidates, images(), rng=rng())


def test_planted_triggers_are_separated_from_clean_images() -> None:
    test = images(seed=1)
    scores = score(DETECTOR, torch.cat([test.images, triggered(test)]))
    target_class = torch.cat([test.labels, test.labels]) == TARGET
    clean_scores = score(DETECTOR, images().images)
    result = score_detection(scores, torch.arange(120) >= 60, target_class, clean_scores)
    assert scores.min() > 0 and scores.max() < 1
    assert result.auroc == 1.0 and result.tpr_at_5_fpr == 1.0 and result.fpr < 0.2


def test_no_score_depends_on_its_neighbors() -> None:
    candidates = images(7, seed=1).images
    together = score(DETECTOR, candidates)
    by_threes = score(CognitiveDistillation(batch_size=3), candidates)
    assert by_threes.tolist() == pytest.approx(together.tolist(), abs=1e-4)
    alone = score(DETECTOR, candidates[2:3])
    assert alone.item() == pytest.approx(together[2].item(), abs=1e-4)


def test_a_larger_weight_of_the_size_hides_more() -> None:
    mild, strict = (
        score(CognitiveDistillation(sparsity=weight), images().images) for weight in (0.1, 10.0)
    )
    assert (mild < strict).all()


@pytest.mark.parametrize(
    "field, value",
    [("steps", 0), ("batch_size", 0), ("lr", 0.0), ("sparsity", 0.0), ("smoothness", -1.0)],
)
def test_out_of_range_fields_are_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}.*{value:g}"):
        CognitiveDistillation(**{field: value})
