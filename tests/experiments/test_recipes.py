"""The experiment on models of many recipes: what it draws, its images, and its tables."""

from pathlib import Path

import pytest
import torch

from experiments import recipes
from experiments.architectures import SUBJECTS
from experiments.recipes import draw_recipe, join, labels, load_splits, summary
from rnp.data.cifar10 import Cifar10
from rnp.data.shapes import CLASSES
from rnp.io.files import read_rows
from rnp.types import ImageSet
from rnp.untrusted.false_alarms import FALSE_ALARMS


def test_a_recipe_depends_on_kind_and_seed_alone():
    drawn = [draw_recipe(kind, seed) for kind in ("benign", "backdoored") for seed in range(40)]
    assert drawn == [draw_recipe(one.kind, one.seed) for one in drawn]
    for field in ("images", "classes", "network", "optimizer", "epochs", "augment"):
        assert len({getattr(one, field) for one in drawn}) > 1, field
    assert all(bool(one.attack) == (one.kind == "backdoored") for one in drawn)
    assert all(one.target < one.classes for one in drawn)


def test_a_network_without_batchnorm_is_trained_by_adamw():
    drawn = [draw_recipe("benign", seed) for seed in range(40)]
    without = [one for one in drawn if SUBJECTS[one.network].train.get("optimizer")]
    assert {one.network for one in without} == {"vgg11", "vit", "convnext", "resnet18_gn"}
    assert all(one.train["optimizer"] == one.optimizer == "adamw" for one in without)
    others = {one.train.get("optimizer", "sgd") for one in drawn if one not in without}
    assert others == {"sgd", "adamw"}


def test_joined_sets_have_the_classes_of_both():
    """Labels of the second set come after those of the first."""
    pixels = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1)
    first = ImageSet(pixels, torch.tensor([0, 1, 1, 0]), ("a", "b"))
    second = ImageSet(pixels + 10, torch.tensor([1, 0, 1, 0]), ("c", "d"))
    both = join([first, second], 4)
    assert both.classes == ("a", "b", "c", "d")
    assert both.labels.tolist() == [0, 1, 1, 0, 3, 2, 3, 2]
    three = join([first, second], 3)
    assert three.labels.tolist() == [0, 1, 1, 0, 2, 2]
    assert three.images.flatten().tolist() == [0, 1, 2, 3, 11, 13]


def test_each_party_has_its_own_images(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (600, 3, 32, 32), generator=generator, dtype=torch.uint8)
    whole = ImageSet(images, torch.arange(600) % 10, tuple("0123456789"))
    monkeypatch.setattr(Cifar10, "load", lambda *_, **__: (whole, whole))
    monkeypatch.setattr(recipes, "TRAINING_IMAGES", 400)
    monkeypatch.setattr(recipes, "TEST_IMAGES", 100)
    monkeypatch.setattr(recipes, "DEFENDER", 50)
    seeds = {draw_recipe("benign", seed).images: seed for seed in range(40)}
    for kind, seed in seeds.items():
        recipe = draw_recipe("benign", seed)
        splits = load_splits(recipe)
        names = {
            "cifar10": whole.classes,
            "shapes": CLASSES,
            "both": (*whole.classes, *CLASSES),
        }[kind]
        parts = (splits.pool, splits.defense.train, splits.defense.val, splits.test)
        assert all(part.classes == names[: recipe.classes] for part in parts)
        sizes = list(map(len, parts))
        assert sizes[1:3] == [50, 50] and sum(sizes[:3]) <= 400 and sizes[3] <= 100
        seen = [image.numpy().tobytes() for part in parts[:3] for image in part.images]
        assert len(set(seen)) == len(seen)


def row(kind, **values):
    names = {name: "" for name in recipes.COLUMNS}
    return names | {"kind": kind, "clean_accuracy_before": "0.9", "gate": ""} | values


@pytest.fixture
def rows():
    """Two benign models, one accused; three backdoored ones, of which one failed its gate."""
    common = {"attack": "blend", "target": "3", "attack_success_rate_before": "1"}
    repaired = {"robust_accuracy": "0.8"}
    return [
        row("benign", clean_accuracy="0.9", consensus="none", latent_trigger="none"),
        row("benign", clean_accuracy="0.88", consensus="2", trigger_size="5", tuned_labels="2 5"),
        row(
            "backdoored",
            **common | repaired,
            gate="true",
            clean_accuracy="0.8",
            attack_success_rate="0.1",
            consensus="3",
            trigger_size="4",
            unanimity="3",
            tuned_labels="3 4",
        ),
        row(
            "backdoored",
            **common | repaired,
            gate="true",
            clean_accuracy="0.9",
            attack_success_rate="0.3",
            consensus="none",
            latent_trigger="none",
            trigger_size="none",
        ),
        row("backdoored", **common, gate="false", clean_accuracy="0.1", consensus="1"),
    ]


def test_the_table_by_hand(rows):
    lines = [line.strip("| ").split(" | ") for line in summary(rows)]
    table = {line[0]: line[1:] for line in lines}
    repaired = "0.900 – 0.890 – – 0.020 –".split()
    assert table["benign"] == ["2", "2", "1", "0", "1", "0", "1", "–", *repaired]
    assert table["backdoored"] == table["blend"]
    repaired = "0.900 1.000 0.850 0.200 0.800 0.100 0.300".split()
    assert table["blend"] == ["2", "2", "1", "0", "1", "1", "1", "1", *repaired]
    assert {len(line) for line in lines[2:]} == {len(recipes.HEADINGS)}


def test_reported_false_alarms_are_those_of_the_rows():
    rows = read_rows(Path(__file__).parents[2] / "results" / "demo" / "recipes.csv")
    benign = [row for row in rows if row["kind"] == "benign"]
    for name, reported in FALSE_ALARMS.items():
        predicted = [labels(row, name) for row in benign]
        judged = [found for found in predicted if found is not None]
        assert reported == (sum(map(bool, judged)), len(judged))
