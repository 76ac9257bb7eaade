"""RNP with rebuilding: what counts as evidence, and what follows from it."""

import dataclasses
import math

import pytest
import torch
from planted import TARGET, BackdooredNet, images, trigger

from rnp.defenses.rnp import RNP
from rnp.defenses.rnp_rebuild import RNPRebuild
from rnp.detection.base import blend
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.prune import Prune
from rnp.rebuild import Rebuild
from rnp.training.augment import Augment
from rnp.training.predict import predict
from rnp.types import DefenseSet, to_floats
from rnp.unlearn import Unlearn

METHOD = RNPRebuild(
    unlearn=Unlearn(epochs=2, max_drop_per_step=0),
    search=NeuralCleanse(steps=150, batch_size=16),
    rebuild=Rebuild(steps=5, batch_size=20, augment=Augment(crop=0, flip=False)),
)


@pytest.fixture
def model():
    return BackdooredNet().eval()


@pytest.fixture
def defense_set():
    return DefenseSet(images(60), images(60, seed=1))


@dataclasses.dataclass
class Script:
    """The sizes of the triggers in the given model and of those that each round is to recover.

    `searched` collects the labels that each round looked at, `against` the labels of the triggers
    of each rebuilding, `budgets` what each pruning might cost.
    """

    given: dict[int, int] = dataclasses.field(default_factory=lambda: {TARGET: 3})
    rounds: list[dict[int, int]] = dataclasses.field(default_factory=list)
    searched: list[list[int]] = dataclasses.field(default_factory=list)
    against: list[list[int]] = dataclasses.field(default_factory=list)
    budgets: list[float] = dataclasses.field(default_factory=list)
    drift: torch.Tensor = dataclasses.field(default_factory=lambda: torch.eye(6)[TARGET] * 0.8)


@pytest.fixture
def script(monkeypatch):
    """Where the script has no size, triggers have 20 to 24 pixels."""
    script = Script()
    rebuild = Rebuild.__call__
    prune = Prune.__call__

    def recover(*_, **__):
        return [trigger(c, script.given.get(c, 20 + c % 5)) for c in range(6)]

    def recover_for(_, labels, *__, **___):
        script.searched.append(list(labels))
        sizes = script.rounds.pop(0) if script.rounds else {}
        return [trigger(label, sizes.get(label, 20)) for label in labels]

    def record_rebuild(self, *args, triggers, **options):
        script.against.append([trigger.label for trigger in triggers])
        return rebuild(self, *args, triggers=triggers, **options)

    def record_prune(self, *args):
        script.budgets.append(self.max_accuracy_drop)
        return prune(self, *args)

    monkeypatch.setattr(NeuralCleanse, "recover", recover)
    monkeypatch.setattr(NeuralCleanse, "recover_for", recover_for)
    monkeypatch.setattr(Rebuild, "__call__", record_rebuild)
    monkeypatch.setattr(Prune, "__call__", record_prune)
    monkeypatch.setattr(PredictionDrift, "from_trajectory", lambda *_: script.drift)
    monkeypatch.setattr(Consensus, "score_unlearned", lambda *_: torch.zeros(6))
    return script


def same(one, other):
    other_state = other.state_dict()
    return all(torch.equal(value, other_state[name]) for name, value in one.state_dict().items())


def test_a_small_trigger_and_the_drift_are_evidence(model, defense_set, rng, script):
    result = METHOD.repair(model, defense_set, rng=rng())
    assert script.against == [[TARGET]] and result.tuned_labels == [TARGET]
    assert script.searched == [[TARGET]]
    assert script.budgets == [METHOD.prune.max_accuracy_drop]


def test_a_label_of_the_consensus_is_evident(model, defense_set, rng, script, monkeypatch):
    script.given = {}
    monkeypatch.setattr(Consensus, "score_unlearned", lambda *_: 2 * torch.eye(6)[4])
    result = METHOD.repair(model, defense_set, rng=rng())
    assert script.against == script.searched == [[4]] and result.tuned_labels == [4]
    assert script.budgets == [METHOD.prune.max_accuracy_drop]


@pytest.mark.parametrize("given, drift", [({TARGET: 3}, 0.4), ({}, 0.8), ({5: 3}, 0.8)])
def test_without_evidence_it_prunes_less_and_rebuilds_against_nothing(
    given, drift, model, defense_set, rng, script
):
    """A small trigger alone, a drift alone, and a drift to another label than its."""
    script.given = given
    script.drift = drift * torch.eye(6)[TARGET]
    result = METHOD.repair(model, defense_set, rng=rng())
    assert script.budgets == [METHOD.cautious_accuracy_drop]
    assert script.against == [[]] and result.tuned_against == []
    assert script.searched == []


def test_equal_triggers_are_not_abnormally_small():
    """Rounding must not make one of them so."""
    assert METHOD.small_size([5.0] * 6) < 5


def test_abnormally_small_in_closed_form():
    """The median of the logarithms is log 8, their median deviation log 2."""
    expected = math.exp(math.log(8) - 2 * 1.4826 * math.log(2))
    assert METHOD.small_size([2.0, 4, 8, 16, 32]) == pytest.approx(expected, rel=1e-5)


def test_every_round_rebuilds_against_all_triggers_so_far(model, defense_set, rng, script):
    script.rounds = [{TARGET: 2}, {TARGET: 2}]
    METHOD.repair(model, defense_set, rng=rng())
    assert script.searched == [[TARGET]] * 2
    assert script.against == [[TARGET], [TARGET] * 2, [TARGET] * 3]


def test_no_rounds_rebuild_once(model, defense_set, rng, script):
    dataclasses.replace(METHOD, tuning_rounds=0).repair(model, defense_set, rng=rng())
    assert script.searched == [] and script.against == [[TARGET]]


def test_up_to_the_pruning_it_is_rnp(model, defense_set, rng, script):
    result = METHOD.repair(model, defense_set, rng=rng())
    method = RNP(unlearn=METHOD.unlearn, recover=METHOD.recover, prune=METHOD.prune)
    expected = method.repair(model, defense_set, rng=rng())
    assert same(result.rnp.model, expected.model) and not same(result.model, expected.model)
    assert result.rnp.chosen == expected.chosen


def test_the_model_and_the_generator_stay_as_they_are(model, defense_set, rng, script, unchanged):
    generator = rng()
    before = generator.get_state()
    METHOD.repair(unchanged(model), defense_set, rng=generator)
    assert torch.equal(generator.get_state(), before)


def test_a_backdoor_that_pruning_leaves_active_is_removed(model, defense_set, rng, monkeypatch):
    """Success of the trigger that the given model has, on images that nothing was tuned on."""
    method = dataclasses.replace(
        METHOD,
        prune=Prune(rule="number", num_neurons=0),
        rebuild=dataclasses.replace(METHOD.rebuild, steps=60, lr=0.05, distort_fraction=0),
    )
    monkeypatch.setattr(Consensus, "score_unlearned", lambda *_: 2 * torch.eye(6)[TARGET])
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


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        ("tuning_rounds", -1, "0 or more"),
        ("min_index", -1, "0 or more"),
        ("cautious_accuracy_drop", 1, r"in \[0, 1\)"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError, match=rf"rnp_rebuild\.{name} must be .*{bounds}"):
        RNPRebuild(**{name: value})
