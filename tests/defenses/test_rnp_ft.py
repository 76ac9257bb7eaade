"""RNP first, and then fine-tuning against the triggers of the labels that are still active."""

import dataclasses

import pytest
import torch
from planted import TARGET, BackdooredNet, images, trigger

from rnp.defenses.nc_unlearn import NCUnlearn
from rnp.defenses.rnp import RNP
from rnp.defenses.rnp_ft import RNPFT
from rnp.detection.base import blend
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.prune import Prune
from rnp.training.augment import Augment
from rnp.training.predict import predict
from rnp.types import DefenseSet, ImageSet, to_floats
from rnp.unlearn import Unlearn

METHOD = RNPFT(
    unlearn=Unlearn(epochs=2, max_drop_per_step=0),
    search=NeuralCleanse(steps=150, batch_size=16),
    lr=0.01,
    steps=40,
    batch_size=20,
    weight_decay=0,
    augment=Augment(crop=0, flip=False),
)


@pytest.fixture
def model():
    return BackdooredNet().eval()


@pytest.fixture
def defense_set():
    return DefenseSet(images(60), images(60, seed=1))


@dataclasses.dataclass
class Script:
    """`rounds` holds the sizes of the triggers that each round is to recover, by label.

    `suspected` collects the labels that were looked at in each round, `tuned` the labels of the
    triggers that each round fine-tuned against.
    """

    rounds: list[dict[int, int]] = dataclasses.field(default_factory=list)
    suspected: list[list[int]] = dataclasses.field(default_factory=list)
    tuned: list[list[int]] = dataclasses.field(default_factory=list)


@pytest.fixture
def script(monkeypatch):
    """The target's trigger has 4 pixels in the given model, the others' 10; a trigger that a round
    recovers has 10 unless the script has another size.
    """
    script = Script()
    tune_against = NCUnlearn.tune_against

    def recover(*_, **__):
        return [trigger(label, 4 if label == TARGET else 10) for label in range(6)]

    def recover_for(_, labels, *__, **___):
        script.suspected.append(list(labels))
        sizes = script.rounds.pop(0)
        return [trigger(label, sizes.get(label, 10)) for label in labels]

    def tune(self, triggers, *args, **options):
        script.tuned.append([trigger.label for trigger in triggers])
        return tune_against(self, triggers, *args, **options)

    monkeypatch.setattr(NeuralCleanse, "recover", recover)
    monkeypatch.setattr(NeuralCleanse, "recover_for", recover_for)
    monkeypatch.setattr(NCUnlearn, "tune_against", tune)
    monkeypatch.setattr(PredictionDrift, "from_trajectory", lambda *_: 0.4 * torch.eye(6)[TARGET])
    return script


def rnp_alone(method):
    return RNP(unlearn=method.unlearn, recover=method.recover, prune=method.prune)


def same(one, other):
    other_state = other.state_dict()
    return all(torch.equal(value, other_state[name]) for name, value in one.state_dict().items())


def test_where_no_label_is_active_it_is_rnp(model, defense_set, rng, script):
    """A trigger in the pruned model as large as that of the median label is not active."""
    script.rounds = [{TARGET: 10}]
    result = METHOD.repair(model, defense_set, rng=rng())
    expected = rnp_alone(METHOD).repair(model, defense_set, rng=rng())
    assert same(result.model, expected.model)
    assert script.suspected == [[TARGET]]
    assert script.tuned == result.tuned_labels == []


def test_the_result_holds_what_led_to_it(model, defense_set, rng, script):
    """RNP's own model is not the one that was tuned."""
    script.rounds = [{TARGET: 9}, {}]
    result = METHOD.repair(model, defense_set, rng=rng())
    expected = rnp_alone(METHOD).repair(model, defense_set, rng=rng())
    assert same(result.rnp.model, expected.model)
    assert not same(result.model, expected.model)
    assert result.rnp.unlearned.trajectory == expected.unlearned.trajectory
    assert [trigger.label for trigger in result.triggers] == list(range(6))
    assert result.tuned_labels == [TARGET]


def test_the_model_and_the_generator_stay_as_they_are(model, defense_set, rng, script, unchanged):
    generator = rng()
    before = generator.get_state()
    script.rounds = [{TARGET: 9}, {}]
    METHOD.repair(unchanged(model), defense_set, rng=generator)
    assert torch.equal(generator.get_state(), before)


def test_every_round_tunes_against_all_triggers_so_far(model, defense_set, rng, script):
    """The given model's and those of the rounds."""
    script.rounds = [{TARGET: 9}] * 3
    dataclasses.replace(METHOD, tuning_rounds=3).repair(model, defense_set, rng=rng())
    assert script.tuned == [[TARGET] * 2, [TARGET] * 3, [TARGET] * 4]


def test_the_rounds_end_when_no_label_is_active(model, defense_set, rng, script):
    script.rounds = [{TARGET: 9}, {TARGET: 11}]
    dataclasses.replace(METHOD, tuning_rounds=3).repair(model, defense_set, rng=rng())
    assert script.suspected == [[TARGET]] * 2
    assert script.tuned == [[TARGET] * 2]


def test_the_label_of_the_drift_is_suspected_too(model, defense_set, rng, script, monkeypatch):
    monkeypatch.setattr(PredictionDrift, "from_trajectory", lambda *_: 0.4 * torch.eye(6)[5])
    script.rounds = [{5: 9}, {}]
    result = METHOD.repair(model, defense_set, rng=rng())
    assert script.suspected[0] == [TARGET, 5]
    assert script.tuned == [[5, 5]]
    assert result.tuned_labels == [5]


def test_a_label_that_the_drift_reports_is_tuned_against_once_whatever_its_trigger(
    model, defense_set, rng, script, monkeypatch
):
    monkeypatch.setattr(PredictionDrift, "from_trajectory", lambda *_: 0.8 * torch.eye(6)[5])
    script.rounds = [{}, {}]
    METHOD.repair(model, defense_set, rng=rng())
    assert script.suspected == [[TARGET, 5]] * 2
    assert script.tuned == [[5, 5]]


def test_a_backdoor_that_pruning_leaves_active_is_removed(model, defense_set, rng):
    """Success of the trigger that the given model has, on images that nothing was tuned on."""
    method = dataclasses.replace(METHOD, prune=Prune(rule="number", num_neurons=0))
    test = images(60, seed=2)
    (recovered,) = method.search.recover_for([TARGET], model, defense_set.train, rng=rng())
    others = to_floats(test.images[test.labels != TARGET])

    def success(network):
        logits = predict(network, blend(others, recovered.mask, recovered.pattern))
        return (logits.argmax(1) == TARGET).float().mean().item()

    result = method.repair(model, defense_set, rng=rng())
    assert success(model) > 0.9
    assert success(result.rnp.model) > 0.9
    assert success(result.model) < 0.2
    assert TARGET in result.tuned_labels


def test_the_outputs_of_the_teacher_replace_the_labels(rng):
    """Its outputs for an image without trigger and rectangle; the labels that came with it do not
    matter.
    """
    clean, teacher = images(60), BackdooredNet().eval()
    mislabeled = ImageSet(clean.images, clean.labels.roll(1), clean.classes)

    def tune(data, **options):
        return METHOD.tune_against(
            [trigger(TARGET, 4)], BackdooredNet(), data, rng=rng(), **options
        )

    taught = tune(clean, teacher=teacher)
    assert same(taught, tune(mislabeled, teacher=teacher))
    assert not torch.equal(taught.head.weight, tune(mislabeled).head.weight)


def test_the_final_weights_are_interpolated(model, defense_set, rng, script):
    """From those of the pruned model, which is the result where no label is active."""

    def repair(interpolation, size):
        script.rounds = [{TARGET: size}, {}]
        method = dataclasses.replace(METHOD, interpolation=interpolation)
        return method.repair(model, defense_set, rng=rng()).model.state_dict()

    pruned, tuned, between = repair(1.0, 10), repair(1.0, 9), repair(0.25, 9)
    assert not torch.equal(pruned["head.weight"], tuned["head.weight"])
    for name in ("conv.weight", "bn.running_var", "head.weight"):
        expected = 0.75 * pruned[name] + 0.25 * tuned[name]
        assert torch.allclose(between[name], expected, atol=1e-6)
    assert torch.equal(between["bn.num_batches_tracked"], tuned["bn.num_batches_tracked"])


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        ("tuning_rounds", 0, "at least 1"),
        ("interpolation", 0, r"in \(0, 1\]"),
        ("trigger_fraction", 0, r"in \(0, 1\]"),
        ("erase_fraction", 2, r"in \[0, 1\]"),
        ("lr", 0, "above 0"),
        ("steps", 0, "above 0"),
        ("batch_size", 0, "above 0"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError, match=rf"rnp_ft\.{name} must be {bounds}, got {value}"):
        RNPFT(**{name: value})
