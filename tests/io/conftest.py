"""A model, a path in a folder that does not exist yet, and a folder with a file of each kind."""

from pathlib import Path

import pytest
import torch
from stored import ARCHITECTURE, CLASSES

from rnp.attacks.badnets import BadNets
from rnp.attacks.base import BlendTrigger
from rnp.io.datasets import save_images, save_poisoned, save_trigger
from rnp.io.models import save_model
from rnp.io.tensors import save_mask


@pytest.fixture
def model(rng):
    mean = torch.full((3,), 0.4)
    std = torch.full((3,), 0.2)
    return ARCHITECTURE.build(4, 3, mean, std, rng=rng()).eval()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new folder" / "file.safetensors"


@pytest.fixture
def folder(tmp_path, model, toy_set, rng):
    """One good file of each kind."""
    poisoned = BadNets(poison_rate=0.5).poison(toy_set(8), rng=rng())
    save_model(tmp_path / "model", model, ARCHITECTURE, CLASSES)
    save_mask(tmp_path / "mask", {"bn": torch.ones(2)})
    save_trigger(tmp_path / "trigger", BlendTrigger(torch.ones(3, 8, 8), torch.ones(1, 8, 8)))
    save_images(tmp_path / "images", toy_set(4))
    save_poisoned(tmp_path / "poisoned", poisoned, {"attack": "badnets"})
    return tmp_path
