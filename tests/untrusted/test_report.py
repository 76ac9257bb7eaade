"""A report is frozen, typed and complete, and a user can read it in JSON and in the terminal."""

import dataclasses
import json
import typing

import pytest

import rnp
from rnp.untrusted.report import (
    AuditReport,
    AuditSettings,
    HeldOutCost,
    ImageFacts,
    ModelFacts,
    Repair,
    RepairSettings,
    summarize,
)

CLASSES = (
    AuditReport,
    AuditSettings,
    HeldOutCost,
    ImageFacts,
    ModelFacts,
    Repair,
    RepairSettings,
)


@pytest.fixture(scope="module")
def report(scene, quick):
    return rnp.inspect(
        scene / "model.safetensors", scene / "clean", spec=quick.spec, **quick.methods
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_every_part_is_frozen_and_every_field_has_a_type(kind):
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        loose = (typing.Any, object, dict, list, tuple)
        assert hints[field.name] not in loose, f"{kind.__name__}.{field.name}"


def test_a_report_cannot_be_changed(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.model.num_classes = 5


def test_a_report_becomes_json(report):
    described = json.loads(json.dumps(report.to_dict()))
    assert described["accuracy_before"]["n"] == 60 and described["seed"] == 0
    assert described["model"]["num_classes"] == 4 and described["images"]["skipped"] == 0
    assert described["labels"].keys() == report.labels.keys()
    assert described["settings"]["unlearn"]["epochs"] == 6
    assert "prune" not in described and "cost" not in described


def test_the_suspected_trigger_is_that_of_the_first_reported_label(report):
    no_label = {
        name: dataclasses.replace(verdict, label=None) for name, verdict in report.labels.items()
    }
    smallest = min(report.triggers, key=lambda trigger: trigger.effective_size)
    assert dataclasses.replace(report, labels=no_label).suspected_trigger is smallest
    first, second = list(report.labels)[1:3]
    reported = no_label | {
        first: dataclasses.replace(report.labels[first], label=2),
        second: dataclasses.replace(report.labels[second], label=3),
    }
    shown = dataclasses.replace(report, labels=reported).suspected_trigger
    assert shown is report.triggers[2]


def test_the_terminal_gets_a_line_for_each_detector(report):
    first, *lines, hint, passes = summarize(report)
    assert first.startswith("resnet10, 4 outputs; accuracy on 60 of your images: ")
    assert [line.split(": ")[0] for line in lines] == [f"label by {name}" for name in report.labels]
    assert hint.endswith("a hint, not a proof")
    described = report.to_dict()["work"]
    assert set(described) == {"unlearn", "detect"}
    unlearned = described["unlearn"]
    assert unlearned["forward_passes"] > unlearned["backward_passes"] > 0
    assert f"unlearn {unlearned['forward_passes']:,} forward" in passes


def test_the_cost_is_a_paired_difference():
    cost = HeldOutCost(turned_wrong=3, turned_right=1, n=40)
    low, high = cost.interval()
    assert cost.value == 0.05 and low < 0.05 < high
