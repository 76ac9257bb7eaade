"""The contract of every attack; a new file in rnp/attacks is tested without further ado."""

import dataclasses

import pytest
import torch

from rnp import registry
from rnp.attacks.base import backdoored_test_set, covered_test_set, other_classes
from rnp.errors import UserError
from rnp.io.datasets import load_trigger, save_trigger
from rnp.training.predict import predict
from rnp.training.recipe import Train
from rnp.types import ImageSet

N = 100
CLASSES = 5
TARGET = 2


# the attack on weights poisons no images, as tests/attacks/test_awp.py asserts
poisons = pytest.mark.parametrize(
    "kind", [name for name in registry.names("attack") if name != "awp"], indirect=True
)


@pytest.fixture(params=registry.names("attack"))
def kind(request):
    return registry.load("attack", request.param)


@pytest.fixture
def attack(kind):
    """The defaults, at rates that make sense for a hundred images."""
    covers = 0.1 if kind.cover_rate else 0.0
    return kind(poison_rate=0.1, cover_rate=covers, target_label=TARGET)


@pytest.fixture
def clean(toy_set):
    return toy_set(N, classes=CLASSES)


@pytest.fixture
def surrogate(toy_model):
    return toy_model(classes=CLASSES)


@pytest.fixture
def trigger(attack, clean, surrogate, rng):
    return attack.make_trigger(clean, rng=rng(), surrogate=surrogate)


def test_only_selected_images_change(attack, clean, surrogate, rng):
    poisoned = attack.poison(clean, rng=rng(), surrogate=surrogate)
    after = poisoned.apply(clean)
    changed = (after.images != clean.images).flatten(1).any(1)
    assert changed.nonzero().squeeze(1).tolist() == poisoned.positions.tolist()
    assert (after.labels != clean.labels)[~changed].sum() == 0
    assert torch.equal(after.images[poisoned.positions], poisoned.images)
    assert after.classes == clean.classes


@poisons
@pytest.mark.parametrize("rate", [0.1, 0.03, 0.15])
def test_the_rate_is_a_share_of_the_whole_set(rate, attack, clean, surrogate, rng):
    attack = dataclasses.replace(attack, poison_rate=rate, cover_rate=0.05)
    poisoned = attack.poison(clean, rng=rng(), surrogate=surrogate)
    assert (~poisoned.covers).sum() == round(rate * N)
    assert poisoned.covers.sum() == 5
    assert poisoned.positions.diff().min() > 0, "positions ascend, none is repeated"


@poisons
def test_labels(attack, clean, surrogate, rng):
    """Covers keep theirs; the others have the target label, for clean-label attacks from before."""
    attack = dataclasses.replace(attack, cover_rate=0.1)
    poisoned = attack.poison(clean, rng=rng(), surrogate=surrogate)
    before = clean.labels[poisoned.positions]
    covers = poisoned.covers
    assert (poisoned.labels[covers] == before[covers]).all()
    assert (before[covers] != TARGET).all()
    assert (poisoned.labels[~covers] == TARGET).all()
    assert ((before[~covers] == TARGET) == attack.clean_label).all()


def test_the_input_and_the_global_generator_stay_as_they_are(
    attack, clean, surrogate, unchanged, rng
):
    images = clean.images.clone()
    labels = clean.labels.clone()
    state = torch.get_rng_state()
    attack.poison(clean, rng=rng(), surrogate=unchanged(surrogate)).apply(clean)
    assert torch.equal(clean.images, images)
    assert torch.equal(clean.labels, labels)
    assert torch.equal(torch.get_rng_state(), state)


@poisons
def test_the_seed_decides(attack, clean, surrogate, rng):
    seed_1, again, seed_2 = (
        attack.poison(clean, rng=rng(seed), surrogate=surrogate) for seed in (1, 1, 2)
    )
    for name in ("positions", "images", "labels", "covers"):
        assert torch.equal(getattr(seed_1, name), getattr(again, name)), name
    assert not torch.equal(seed_1.images, seed_2.images)
    assert not torch.equal(seed_1.positions, seed_2.positions)


def test_each_image_is_triggered_alone(trigger, clean):
    images = clean.as_floats()[:12]
    alone = torch.cat([trigger(image) for image in images.split(1)])
    assert torch.allclose(trigger(images), alone, atol=1e-6)
    assert torch.allclose(trigger(images.flip(0)).flip(0), alone, atol=1e-6), "the neighbors matter"


def test_the_trigger_leaves_its_input_alone_and_is_the_same_each_time(trigger, clean):
    images = clean.as_floats()[:5]
    before = images.clone()
    triggered = trigger(images)
    assert torch.equal(trigger(images), triggered)
    assert torch.equal(images, before)


@pytest.mark.parametrize("value", [0.0, 1.0, "noise"])
def test_images_stay_between_0_and_1(value, trigger, rng):
    images = (
        torch.rand(8, 3, 8, 8, generator=rng())
        if value == "noise"
        else torch.full((8, 3, 8, 8), value)
    )
    triggered = trigger(images)
    assert triggered.shape == images.shape
    assert triggered.dtype == images.dtype
    assert triggered.isfinite().all()
    assert triggered.min() >= -1e-6
    assert triggered.max() <= 1 + 1e-6


def test_the_trigger_survives_its_file(trigger, clean, tmp_path):
    path = tmp_path / "trigger.safetensors"
    save_trigger(path, trigger)
    loaded = load_trigger(path)
    assert type(loaded) is type(trigger)
    assert torch.equal(loaded(clean.as_floats()), trigger(clean.as_floats()))
    assert list(trigger.parameters()) == [], "all state is in buffers"


def test_the_support_is_where_it_acts(trigger, rng):
    images = torch.rand(50, 3, 8, 8, generator=rng())
    touched = (trigger(images) != images).any(0).any(0)
    assert touched.any()
    assert trigger.support is None or torch.equal(touched, trigger.support)


def test_the_set_for_asr_holds_the_other_classes_under_true_labels(trigger, clean, toy_set):
    test = toy_set(30, classes=CLASSES, seed=1)
    triggered = backdoored_test_set(trigger, test, TARGET)
    kept = test.labels != TARGET
    assert torch.equal(triggered.labels, test.labels[kept])
    assert TARGET not in triggered.labels
    assert triggered.images.dtype == torch.uint8
    exact = trigger(test.subset(kept.nonzero().squeeze(1)).as_floats()) * 255
    assert (triggered.images - exact).abs().max() <= 0.501, "rounded, not cut"


def test_the_set_of_covers_holds_the_same_images_as_covers(attack, trigger, clean, toy_set, rng):
    test = toy_set(24, classes=CLASSES, seed=4)
    triggered = backdoored_test_set(trigger, test, attack.target)
    covered = covered_test_set(attack, trigger, test, rng=rng())
    assert torch.equal(covered.labels, triggered.labels)
    assert covered.images.shape == triggered.images.shape
    again = covered_test_set(attack, trigger, test, rng=rng())
    assert torch.equal(covered.images, again.images)
    assert not torch.equal(covered.images, other_classes(test, attack.target).images)


def test_training_returns_a_model_and_the_final_trigger(
    attack, clean, surrogate, toy_model, trigger, rng
):
    poisoned = attack.poison(clean, rng=rng(), surrogate=surrogate).apply(clean)
    recipe = Train(epochs=1, batch_size=50)
    model, final = attack.train(toy_model(classes=CLASSES), poisoned, trigger, recipe, rng=rng())
    assert not model.training
    assert predict(model, final(clean.as_floats())).isfinite().all()


@poisons
def test_all_to_all_sends_each_class_to_the_next(kind, attack, clean, surrogate, rng, toy_set):
    if kind.clean_label:
        message = f"label_mode all_to_all changes labels, but {attack.name} is clean-label"
        with pytest.raises(UserError, match=message):
            dataclasses.replace(attack, label_mode="all_to_all")
        return
    attack = dataclasses.replace(attack, label_mode="all_to_all", cover_rate=0.1)
    poisoned = attack.poison(clean, rng=rng(), surrogate=surrogate)
    before = clean.labels[poisoned.positions]
    expected = torch.where(poisoned.covers, before, (before + 1) % CLASSES)
    assert torch.equal(poisoned.labels, expected)
    test = toy_set(30, classes=CLASSES, seed=1)
    triggered = backdoored_test_set(poisoned.trigger, test, attack.target)
    assert torch.equal(triggered.labels, test.labels), "no class is left out"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"poison_rate": 10},
            "poison_rate must be in (0, 1], got 10; it is a fraction, not percent: did you mean",
        ),
        ({"poison_rate": 0}, "poison_rate must be in (0, 1], got 0"),
        ({"poison_rate": -0.1}, "poison_rate must be in (0, 1], got -0.1"),
        ({"poison_rate": float("nan")}, "poison_rate must be in (0, 1], got nan"),
        ({"cover_rate": 3}, "cover_rate must be in [0, 1], got 3; it is a fraction, not percent"),
        ({"target_label": -1}, "target_label must be 0 or more, got -1"),
        ({"target_label": 5}, "target_label must be below the number of classes, 5, got 5"),
        ({"poison_rate": 0.001}, "rounds to no image of 100; raise poison_rate"),
        ({"poison_rate": 0.95}, "asks for 95 images"),
        ({"cover_rate": 0.85}, "cover_rate asks for 85 images, but only"),
    ],
)
def test_wrong_settings_name_the_value_and_the_way_out(
    options, message, kind, clean, surrogate, rng
):
    with pytest.raises(UserError) as caught:
        kind(**({"poison_rate": 0.1} | options)).poison(clean, rng=rng(), surrogate=surrogate)
    assert message in str(caught.value)


@pytest.mark.parametrize("option", ["poison_rate", "cover_rate"])
def test_the_message_names_the_attack_and_the_option(option, kind):
    name = kind.__module__.rpartition(".")[2]
    with pytest.raises(UserError, match=rf"^{name}\.{option} must be in .*, got 2;"):
        kind(**{option: 2})


def test_gray_and_oblong_images_are_taken(attack, surrogate, rng, toy_model):
    images = torch.randint(0, 256, (N, 1, 10, 14), generator=rng(), dtype=torch.uint8)
    clean = ImageSet(images, torch.arange(N) % CLASSES, tuple("abcde"))
    poisoned = attack.poison(clean, rng=rng(), surrogate=toy_model(classes=CLASSES, channels=1))
    assert poisoned.images.shape[1:] == (1, 10, 14)
