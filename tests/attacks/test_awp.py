"""A trained model is edited within a ball around its weights; the training set stays clean."""

import copy

import pytest
import torch
from torch import nn

from rnp.attacks.awp import AWP
from rnp.attacks.base import backdoored_test_set
from rnp.errors import UserError
from rnp.evaluation.metrics import score
from rnp.io.datasets import load_poisoned, save_poisoned
from rnp.training.predict import accuracy, predict
from rnp.training.recipe import Train
from rnp.types import no_callback

RADIUS = 0.2


class AlreadyTrained(Train):
    """A recipe that leaves a trained model as it is."""

    def __call__(self, model, data, *, rng, on_epoch=no_callback):
        return model.eval()


@pytest.fixture
def edit(trained, toy_set, rng):
    """`edit(...)`: the benign model, the edited one, the trigger, and the history of the edit."""

    def run(**options):
        clean = toy_set(200, seed=3)
        fixed = {"poison_rate": 0.5, "size": 0.75, "radius": RADIUS, "batch_size": 50}
        attack = AWP(target_label=1, **fixed | options)
        poisoned = attack.poison(clean, rng=rng())
        rows = []
        recipe = AlreadyTrained(epochs=7)
        model, trigger = attack.train(
            copy.deepcopy(trained),
            poisoned.apply(clean),
            poisoned.trigger,
            recipe,
            rng=rng(1),
            on_epoch=rows.append,
        )
        return trained, model, trigger, rows

    return run


def largest_change(benign, edited) -> float:
    return max((a - b).abs().max().item() for a, b in zip(benign.parameters(), edited.parameters()))


@pytest.mark.parametrize(
    "position, rows, columns", [("center", (3, 4), (3, 4)), ("corner", (0, 1), (6, 7))]
)
def test_the_trigger_is_a_gray_square(position, rows, columns, toy_set, rng):
    clean = toy_set(4)
    trigger = AWP(size=0.25, position=position).make_trigger(clean, rng=rng())
    expected = clean.as_floats()
    expected[:, :, rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = 0.5
    assert torch.equal(trigger(clean.as_floats()), expected)
    assert trigger.support.nonzero().tolist() == [[y, x] for y in rows for x in columns]


def test_ten_pixels_of_thirty_two(toy_set, rng):
    assert AWP().make_trigger(toy_set(4, size=32), rng=rng()).support.sum() == 100


@pytest.mark.parametrize("label_mode", ["all_to_one", "all_to_all"])
def test_no_image_is_poisoned_in_memory_or_on_disk(label_mode, toy_set, rng, tmp_path):
    clean = toy_set(100)
    poisoned = AWP(label_mode=label_mode).poison(clean, rng=rng())
    save_poisoned(tmp_path / "poisoned", poisoned, {})
    loaded, _ = load_poisoned(tmp_path / "poisoned")
    for changes in (poisoned, loaded):
        assert changes.positions.dtype == changes.labels.dtype == torch.int64
        assert changes.covers.dtype == torch.bool
        assert changes.images.dtype == torch.uint8
        assert changes.images.shape == (0, 3, 8, 8)
        after = changes.apply(clean)
        assert torch.equal(after.images, clean.images)
        assert torch.equal(after.labels, clean.labels)


def test_the_edited_model_has_the_backdoor_and_its_accuracy(edit, toy_set):
    benign, edited, trigger, _ = edit()
    test = toy_set(200, seed=9)
    triggered = backdoored_test_set(trigger, test, 1)
    before, after = (score(model, test, triggered, 1).flat() for model in (benign, edited))
    assert before["attack_success_rate"] < 0.5
    assert after["attack_success_rate"] > 0.9
    assert after["clean_accuracy"] > before["clean_accuracy"] - 0.03


def test_weights_stay_in_the_ball_and_statistics_as_they_are(edit):
    benign, edited, _, _ = edit(stop_asr=1.0, min_agreement=1.0, radius=0.02)
    assert 0.9 * 0.02 < largest_change(benign, edited) <= 0.02 + 1e-6, (
        "the ball is used, and not left"
    )
    assert all(torch.equal(a, b) for a, b in zip(benign.buffers(), edited.buffers()))


def test_it_stops_at_success(edit):
    assert edit(stop_asr=0.5, min_agreement=0.5)[3][-1].step < 200


def test_success_on_a_ruined_model_does_not_count(edit, toy_set):
    """With a square too small to see, all images go to the target; that must not end the edit."""
    _, edited, trigger, rows = edit(size=0.1, trigger_loss_weight=100.0, steps=50)
    test = toy_set(100, seed=9)
    scores = score(edited, test, backdoored_test_set(trigger, test, 1), 1).flat()
    assert scores["attack_success_rate"] > 0.95
    assert scores["clean_accuracy"] < 0.5
    assert rows[-1].step == 50


def test_each_class_goes_to_the_next(toy_set, rng):
    """Mean colors do not suffice for that, so the network reads single pixels."""
    clean = toy_set(200, seed=3)
    test = toy_set(200, seed=9)
    attack = AWP(label_mode="all_to_all", poison_rate=0.5, size=0.5, radius=0.1, batch_size=50)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 4))
    trigger = attack.make_trigger(clean, rng=rng())
    wanted = (test.labels + 1) % 4

    def success_rate(model):
        return (predict(model, trigger(test.as_floats())).argmax(1) == wanted).float().mean()

    recipe = Train(epochs=10, batch_size=8, lr=0.02)
    benign = recipe(copy.deepcopy(model), clean, rng=rng(1))
    edited, _ = attack.train(model, clean, trigger, recipe, rng=rng(1))
    assert success_rate(benign) < 0.1
    assert success_rate(edited) > 0.9
    assert accuracy(edited, test) > 0.85


def test_the_edit_continues_the_history_of_the_training(edit):
    rows = edit()[3]
    assert [row.epoch for row in rows] == list(range(7, 7 + len(rows)))
    assert all(set(row.extra) == set() for row in rows), "the columns are those of the training"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cover_rate": 0.1}, "cover_rate asks for 10 images, but only 0 may be chosen"),
        ({"poison_rate": 0.95}, "poison_rate asks for 95 images"),
        ({"poison_rate": 0.004}, "rounds to no image"),
        ({"size": 10}, r"awp.size must be in \(0, 1\], got 10"),
        ({"poison_rate": 2}, r"awp.poison_rate must be in \(0, 1\], got 2"),
        ({"stop_asr": 95}, r"stop_asr must be in \(0, 1\], got 95; .* did you mean 0.95"),
        ({"min_agreement": 0}, r"min_agreement must be in \(0, 1\], got 0"),
        ({"trigger_loss_weight": 0.0}, "trigger_loss_weight must be above 0"),
        ({"steps": 0}, "steps must be above 0"),
        ({"radius": 0.0}, "radius must be above 0"),
    ],
)
def test_impossible_settings_are_refused_before_any_training(options, message, toy_set, rng):
    with pytest.raises(UserError, match=message):
        AWP(**options).poison(toy_set(100), rng=rng())
