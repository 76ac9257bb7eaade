"""Pruning first, and then tuning against the trigger of the label that stands out."""

import dataclasses

import pytest
import torch
from planted import TARGET, images
from torch import nn

from rnp.defenses.nc_unlearn import NCUnlearn
from rnp.defenses.rnp_ft import RNPFT
from rnp.detection.base import RecoveredTrigger, blend
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.training.augment import Augment
from rnp.training.predict import predict
from rnp.types import DefenseSet, ImageSet, to_floats
from rnp.unlearn import Unlearn

METHOD = RNPFT(
    unlearn=Unlearn(epochs=2, max_drop_per_step=0),
    search=NeuralCleanse(steps=150, batch_size=16, precision="fp32"),
    lr=0.01,
    steps=40,
    batch_size=20,
    weight_decay=0,
    precision="fp32",
    augment=Augment(crop=0, flip=False),
)


class Doorway(nn.Module):
    """Channel 0 of its layer sees the bright corner that leads to class 3, channels 1 to 6 the
    rows of the six classes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 7, 8, bias=False), nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 6)
        weight = torch.zeros(7, 3, 8, 8)
        weight[0, :, 6:, 6:] = 1 / 12
        for c in range(6):
            weight[1 + c, :, c] = 1 / 24
        self.conv.weight.data = weight
        self.bn.bias.data[0] = -0.15  # the corner must be brighter than it ever is
        head = torch.zeros(6, 7)
        head[:, 1:] = 4 * torch.eye(6)
        head[TARGET, 0] = 60.0
        self.head.weight.data, self.head.bias.data = head, torch.zeros(6)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x))).flatten(1))


@pytest.fixture
def defense_set():
    return DefenseSet(images(60), images(60, seed=1))


def trigger(label, area):
    """A mask of that many pixels that moves every image."""
    mask = torch.zeros(64)
    mask[:area] = 1
    return RecoveredTrigger(label, mask.view(8, 8), torch.ones(3, 8, 8), 1.0, 0.0)


@pytest.fixture
def scripted(monkeypatch):
    """The target's trigger has 4 pixels in the given model, the others' 10; what the rounds find
    is given, by label.

    Gives the labels that were asked for in each round, and those of the triggers that were tuned
    against.
    """
    asked, against, tune = [], [], NCUnlearn.tune_against
    rounds = []

    def found(_, labels, *rest, **named):
        asked.append(list(labels))
        sizes = rounds.pop(0)
        return [trigger(label, sizes.get(label, 10)) for label in labels]

    monkeypatch.setattr(
        NeuralCleanse,
        "recover",
        lambda *_, **__: [trigger(label, 4 if label == TARGET else 10) for label in range(6)],
    )
    monkeypatch.setattr(NeuralCleanse, "recover_for", found)
    monkeypatch.setattr(PredictionDrift, "from_trajectory", lambda *_: 0.4 * torch.eye(6)[TARGET])
    monkeypatch.setattr(
        NCUnlearn,
        "tune_against",
        lambda self, triggers, *rest, **named: (
            against.append([each.label for each in triggers]),
            tune(self, triggers, *rest, **named),
        )[1],
    )
    return rounds, asked, against


def test_where_no_label_is_open_it_is_rnp(defense_set, rng, scripted):
    """A trigger in the pruned model as large as that of the median label is closed."""
    model, (rounds, asked, against) = Doorway().eval(), scripted
    rounds += [{TARGET: 10}]
    repaired = METHOD.repair(model, defense_set, rng=rng()).model
    draw = rng()
    mask = METHOD.recover(
        METHOD.unlearn(model, defense_set.train, rng=draw).model, defense_set.train, rng=draw
    ).mask
    pruned = METHOD.prune(model, mask, defense_set.all).model.state_dict()
    assert all(torch.equal(value, pruned[name]) for name, value in repaired.state_dict().items())
    assert asked == [[TARGET]] and against == []


def test_every_round_tunes_against_all_triggers_so_far(defense_set, rng, scripted):
    """The given model's and those of the rounds."""
    rounds, _, against = scripted
    rounds += [{TARGET: 9}] * 3
    dataclasses.replace(METHOD, tuning_rounds=3).repair(Doorway().eval(), defense_set, rng=rng())
    assert against == [[TARGET] * 2, [TARGET] * 3, [TARGET] * 4]


def test_the_rounds_end_when_nothing_is_open(defense_set, rng, scripted):
    rounds, asked, against = scripted
    rounds += [{TARGET: 9}, {TARGET: 11}]
    dataclasses.replace(METHOD, tuning_rounds=3).repair(Doorway().eval(), defense_set, rng=rng())
    assert asked == [[TARGET]] * 2 and against == [[TARGET] * 2]


def test_the_label_of_the_drift_is_looked_at_too(defense_set, rng, scripted, monkeypatch):
    rounds, asked, against = scripted
    monkeypatch.setattr(PredictionDrift, "from_trajectory", lambda *_: 0.4 * torch.eye(6)[5])
    rounds += [{5: 9}, {}]
    METHOD.repair(Doorway().eval(), defense_set, rng=rng())
    assert asked[0] == [TARGET, 5] and against == [[5, 5]]


def test_a_label_that_the_drift_names_is_tuned_against_once_whatever_its_trigger(
    defense_set, rng, scripted, monkeypatch
):
    rounds, asked, against = scripted
    monkeypatch.setattr(PredictionDrift, "from_trajectory", lambda *_: 0.8 * torch.eye(6)[5])
    rounds += [{}, {}]
    METHOD.repair(Doorway().eval(), defense_set, rng=rng())
    assert asked == [[TARGET, 5]] * 2 and against == [[5, 5]]


def test_a_door_that_pruning_leaves_open_is_shut(defense_set, rng, monkeypatch):
    """Success of the trigger that the given model has, on images that nothing was tuned on."""
    monkeypatch.setattr(
        type(METHOD.prune), "__call__", lambda _, model, *__: type("Left", (), {"model": model})()
    )
    model, test = Doorway().eval(), images(60, seed=2)
    (trigger,) = METHOD.search.recover_for([TARGET], model, defense_set.train, rng=rng())
    victims = to_floats(test.images[test.labels != TARGET])

    def success(network):
        return (
            (predict(network, blend(victims, trigger.mask, trigger.pattern)).argmax(1) == TARGET)
            .float()
            .mean()
            .item()
        )

    assert success(model) > 0.9
    assert success(METHOD.repair(model, defense_set, rng=rng()).model) < 0.2


def test_the_teacher_stands_in_for_the_labels(rng):
    """What the teacher says of an image without trigger and paint; the labels that came with it do
    not matter.
    """
    clean, teacher = images(60), Doorway().eval()
    wrong = ImageSet(clean.images, clean.labels.roll(1), clean.classes)
    one, two, three = (
        METHOD.tune_against([trigger(TARGET, 4)], Doorway(), data, rng=rng(), **named).state_dict()
        for data, named in (
            (clean, {"teacher": teacher}),
            (wrong, {"teacher": teacher}),
            (wrong, {}),
        )
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(two["head.weight"], three["head.weight"])


def test_the_weights_go_a_share_of_the_way(defense_set, rng, scripted):
    """From those of the pruned model, which is what comes out where no label is open."""
    rounds, _, _ = scripted
    found = []
    for share, size in ((1.0, 10), (1.0, 9), (0.25, 9)):
        rounds[:] = [{TARGET: size}, {}]
        method = dataclasses.replace(METHOD, interpolation=share)
        found.append(method.repair(Doorway().eval(), defense_set, rng=rng()).model.state_dict())
    pruned, tuned, between = found
    assert not torch.equal(pruned["head.weight"], tuned["head.weight"])
    for name in ("conv.weight", "bn.running_var", "head.weight"):
        assert torch.allclose(between[name], 0.75 * pruned[name] + 0.25 * tuned[name], atol=1e-6)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rounds": 0}, "rnp_ft.rounds must be at least 1, got 0"),
        ({"share": 0}, r"rnp_ft.share must be in \(0, 1\], got 0"),
    ],
)
def test_a_wrong_option_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        RNPFT(**wrong)
