"""RNP with rebuilding: what counts as evidence, and what follows from it."""

import dataclasses

import pytest
import torch
from planted import TARGET, BackdooredNet, images, trigger

from rnp.defenses.rnp import RNP
from rnp.defenses.rnp_rebuild import (
    EVIDENCE,
    UNANIMITY,
    RNPRebuild,
    give_verdicts,
    is_active,
    predicted_labels,
)
from rnp.detection.base import blend
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.latent_trigger import LatentTrigger
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.detection.variants import VariantSearch
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
    """The sizes of the triggers in the given model, and those of the variants of each search.

    `searched` collects the labels of each search, `against` those of the triggers of each
    rebuilding, `budgets` what each pruning might cost.
    """

    given: dict[int, int] = dataclasses.field(default_factory=lambda: {TARGET: 3})
    variants: list[int] = dataclasses.field(default_factory=list)
    searched: list[int] = dataclasses.field(default_factory=list)
    against: list[list[int]] = dataclasses.field(default_factory=list)
    budgets: list[float] = dataclasses.field(default_factory=list)


@pytest.fixture
def script(monkeypatch):
    """Where the script has no size, triggers have 20 to 24 pixels and there are no variants."""
    script = Script()
    rebuild = Rebuild.__call__
    prune = Prune.__call__

    def recover(*_, **__):
        return [trigger(c, script.given.get(c, 20 + c % 5)) for c in range(6)]

    def search_variants(_, known, *__, **___):
        script.searched.append(known.label)
        return [trigger(known.label, script.variants.pop(0))] if script.variants else []

    def record_rebuild(self, *args, triggers, **options):
        script.against.append([trigger.label for trigger in triggers])
        return rebuild(self, *args, triggers=triggers, **options)

    def record_prune(self, *args):
        script.budgets.append(self.max_accuracy_drop)
        return prune(self, *args)

    monkeypatch.setattr(NeuralCleanse, "recover", recover)
    monkeypatch.setattr(VariantSearch, "__call__", search_variants)
    monkeypatch.setattr(Rebuild, "__call__", record_rebuild)
    monkeypatch.setattr(Prune, "__call__", record_prune)
    monkeypatch.setattr(Consensus, "score_unlearned", lambda *_: torch.zeros(6))
    monkeypatch.setattr(LatentTrigger, "score", lambda *_, **__: torch.zeros(6))
    return script


def same(one, other):
    other_state = other.state_dict()
    return all(torch.equal(value, other_state[name]) for name, value in one.state_dict().items())


def test_a_trigger_far_smaller_than_the_others_is_evidence(model, defense_set, rng, script):
    result = METHOD.repair(model, defense_set, rng=rng())
    assert script.against == [[TARGET]] and result.tuned_labels == [TARGET]
    assert script.searched == [TARGET] * 2, "in the given model, and in the rebuilt one"
    assert script.budgets == [METHOD.prune.max_accuracy_drop]


@pytest.mark.parametrize(
    "detector, method", [(Consensus, "score_unlearned"), (LatentTrigger, "score")]
)
def test_so_is_the_verdict_of_the_other_two(
    detector, method, model, defense_set, rng, script, monkeypatch
):
    script.given = {}
    monkeypatch.setattr(detector, method, lambda *_, **__: 2 * torch.eye(6)[4])
    result = METHOD.repair(model, defense_set, rng=rng())
    assert script.against == [[4]] and result.tuned_labels == [4]
    assert script.budgets == [METHOD.prune.max_accuracy_drop]


def scores_of(**highest):
    """The score of each detector for its first class, by name; the other classes have 0."""
    by_name = {one.name: one for one in EVIDENCE}
    return {by_name[name]: value * torch.eye(6)[c] for name, (c, value) in highest.items()}


@pytest.mark.parametrize(
    "consensus, latent_trigger, trigger_size, label",
    [
        ((4, 0.1), (4, 0.01), (4, 0.01), 4),
        ((4, 0.0), (0, 0.01), (0, 0.01), None),  # the parts of the first one do not agree
        ((4, 0.1), (4, 0.01), (3, 0.01), None),
    ],
)
def test_so_is_the_class_that_all_three_rank_first(consensus, latent_trigger, trigger_size, label):
    scores = scores_of(
        consensus=consensus, latent_trigger=latent_trigger, trigger_size=trigger_size
    )
    assert all(one.verdict(values).label is None for one, values in scores.items())
    verdicts = give_verdicts(scores)
    assert verdicts.keys() == {*(one.name for one in EVIDENCE), UNANIMITY}
    assert verdicts[UNANIMITY].label == label
    assert predicted_labels(verdicts.values()) == ([] if label is None else [label])


def test_two_detectors_are_not_unanimous():
    scores = scores_of(consensus=(4, 0.1), trigger_size=(4, 0.01))
    assert give_verdicts(scores).keys() == {"consensus", "trigger_size"}


def test_several_labels_can_be_evident(model, defense_set, rng, script, monkeypatch):
    monkeypatch.setattr(LatentTrigger, "score", lambda *_, **__: 2 * torch.eye(6)[1])
    METHOD.repair(model, defense_set, rng=rng())
    assert script.against == [[1, TARGET]]


def test_without_evidence_and_without_pruning_the_model_stays_as_it_is(
    model, defense_set, rng, script
):
    script.given = {}
    method = dataclasses.replace(METHOD, prune=Prune(rule="number", num_neurons=0))
    result = method.repair(model, defense_set, rng=rng())
    assert script.against == [] and not result.is_rebuilt and same(result.model, model)


@pytest.mark.parametrize("given", [{}, {TARGET: 3, 5: 3}])
def test_without_evidence_it_prunes_less_and_rebuilds_against_nothing(
    given, model, defense_set, rng, script
):
    """Triggers of about the same size, and two that are equally small."""
    script.given = given
    result = METHOD.repair(model, defense_set, rng=rng())
    assert script.budgets == [METHOD.cautious_accuracy_drop]
    assert script.against == [[]] and result.tuned_against == []
    assert script.searched == []


def test_a_detector_that_cannot_judge_the_model_is_left_out(
    model, defense_set, rng, script, monkeypatch
):
    script.given = {}
    monkeypatch.setattr(LatentTrigger, "score", lambda *_, **__: 2 * torch.eye(6)[4])
    monkeypatch.setattr(LatentTrigger, "obstacle", lambda *_: "needs another model")
    METHOD.repair(model, defense_set, rng=rng())
    assert script.against == [[]]


@pytest.mark.parametrize(
    "area, gain, active",
    [
        (6, 0.3, True),  # a tenth of the 64 pixels
        (6, 0.05, False),  # moves too few images
        (11, 0.3, True),  # half of the median, 22
        (12, 0.3, False),
    ],
)
def test_which_triggers_count_as_active(area, gain, active):
    given = [trigger(c, 3 if c == TARGET else 20 + c) for c in range(6)]
    found = dataclasses.replace(trigger(TARGET, area), success=gain)
    assert is_active(found, given, [TARGET]) == active


def test_every_round_rebuilds_against_all_triggers_so_far(model, defense_set, rng, script):
    """A variant in the given model, one after each of two rebuildings, and no more."""
    script.variants = [2, 2, 2]
    METHOD.repair(model, defense_set, rng=rng())
    assert script.searched == [TARGET] * 4
    # 2; 3, and the new one twice more; 4, and the new one three times more
    assert [len(labels) for labels in script.against] == [2, 5, 7]
    assert {label for labels in script.against for label in labels} == {TARGET}


def test_a_trigger_of_the_usual_size_ends_the_rounds(model, defense_set, rng, script):
    script.variants = [2, 20]
    METHOD.repair(model, defense_set, rng=rng())
    assert script.against == [[TARGET] * 2]


def test_no_rounds_rebuild_once(model, defense_set, rng, script):
    script.variants = [2, 2]
    dataclasses.replace(METHOD, tuning_rounds=0).repair(model, defense_set, rng=rng())
    assert script.searched == [TARGET] and script.against == [[TARGET] * 2]


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
        ("cautious_accuracy_drop", 1, r"in \[0, 1\)"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError, match=rf"rnp_rebuild\.{name} must be .*{bounds}"):
        RNPRebuild(**{name: value})
