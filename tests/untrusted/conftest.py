"""A model of unknown origin and clean images, as a defender has them."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.io.datasets import save_defense_set
from rnp.io.models import save_model
from rnp.models.build import Architecture
from rnp.rebuild import Rebuild
from rnp.recover import Recover
from rnp.training.recipe import Train
from rnp.types import DefenseSet
from rnp.unlearn import Unlearn
from rnp.untrusted.spec import ModelSpec

NAMES = ("bird<b>", "class1", "class2", "class3")


@pytest.fixture(scope="session")
def quick():
    """Options and arguments with which an audit of the toy takes seconds."""
    return SimpleNamespace(
        model="--arch resnet10 --width 4 --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25"
        " --image-size 16".split(),
        unlearn="--unlearn.epochs 6 --unlearn.lr 0.05 --unlearn.growth 1".split(),
        search="--search.steps 3 --search.batch-size 2".split(),
        recover="--recover.steps 4 --rebuild.steps 0".split(),
        spec=ModelSpec(
            arch="resnet10", width=4, mean="0.5,0.5,0.5", std="0.25,0.25,0.25", image_size=16
        ),
        methods={
            "unlearn": Unlearn(lr=0.05, epochs=6),
            "search": NeuralCleanse(steps=2, batch_size=2),
        },
        repair={"recover": Recover(steps=4), "rebuild": Rebuild(steps=0)},
    )


@pytest.fixture(scope="session")
def scene(tmp_path_factory, toy_set, rng):
    """A folder with model.safetensors, under a network's own names, and clean/CLASS/*.png.

    It also has a model of the pipeline, backdoored.safetensors, and its defense set.
    """
    folder = tmp_path_factory.mktemp("untrusted")
    architecture = Architecture(arch="resnet10", width=4)
    half = torch.full((3,), 0.5)
    model = architecture.build(4, 3, half, half / 2, rng=rng())
    Train(epochs=6, batch_size=16, lr=0.1)(model, toy_set(160, size=16), rng=rng())
    weights = {name: value.contiguous() for name, value in model.net.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    data = toy_set(60, size=16, seed=5)
    for i, (image, label) in enumerate(zip(data.images, data.labels)):
        path = folder / "clean" / NAMES[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    save_model(folder / "backdoored.safetensors", model, architecture, data.classes)
    save_defense_set(folder / "defense", DefenseSet(data, toy_set(60, size=16, seed=6)))
    return folder
