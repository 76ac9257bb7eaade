"""VGG with and without BatchNorm, shaped for small images."""

from __future__ import annotations

from torch import Tensor, nn

Plan = tuple[int | str, ...]
VGG11: Plan = (
    1,
    "pool",
    2,
    "pool",
    4,
    4,
    "pool",
    8,
    8,
    "pool",
    8,
    8,
)  # channels in units of `width`
VGG19: Plan = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, 4, "pool", 8, 8, 8, 8, "pool", 8, 8, 8, 8)


class VGG(nn.Module):
    def __init__(self, plan: Plan, norm: bool, classes: int, *, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for entry in plan:
            if entry == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, entry * width, 3, padding=1, bias=not norm),
                *([nn.BatchNorm2d(entry * width)] if norm else []),
                nn.ReLU(),
            ]
            channels = entry * width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))
