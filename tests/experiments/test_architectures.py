"""The matrix of architectures: each is built and repaired on a few images; the summary by hand."""

import sys

import jaxtyping
import pytest
import yaml

import experiments.architectures
from experiments.architectures import COLUMNS, STEPS, SUBJECTS, main, run, summary
from rnp.errors import UserError
from rnp.io.files import read_rows
from rnp.params.presets import render
from rnp.params.read import Loader


@pytest.fixture
def params(monkeypatch):
    """The preset with as few images and steps as every step allows."""
    # PyTorch traces with stand-ins for tensors.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(experiments.architectures, "keep_freed_pages", lambda: None)
    few = yaml.load(render("demo"), Loader)
    few["datasets"]["shapes"] |= {"train": 90, "test": 20}
    few["data"] |= {"defense_train": 20, "defense_val": 20}
    few["precision"] = "fp32"
    few["train"] |= {"epochs": 1}
    few["unlearn"] |= {"epochs": 1}
    few["recover"] |= {"steps": 1}
    few["defenses"]["rnp_rebuild"] = {
        "unlearn": {"epochs": 1},
        "recover": {"steps": 1},
        "prune": {"max_fraction": 0.002},
        "rebuild": {"steps": 1},
        "search": {"steps": 1},
        "tuning_rounds": 0,
    }
    few["prune"] |= {"max_fraction": 0.002}
    return few


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_stage_accepts_every_architecture(name, params):
    row = run(params, name, "badnets", 0)
    assert row.get("failed", "") == "" and row["neurons"] > row["neurons_pruned"]
    assert 0 <= row["der"] <= 1 and 0 <= row["der_rnp_rebuild"] <= 1
    assert all(row[f"seconds_{step}"] > 0 for step in STEPS)
    assert row.keys() <= set(COLUMNS)


def test_what_was_measured_before_a_failure_is_kept(params, monkeypatch):
    def fail(*_, **__):
        raise UserError("no neurons to mask")

    monkeypatch.setattr("rnp.recover.Recover.__call__", fail)
    row = run(params, "resnet18", "badnets", 0)
    assert row["failed"] == "no neurons to mask" and row["unlearned_accuracy"] > 0
    assert row["seconds_unlearn"] > 0 and "seconds_prune" not in row and "der" not in row


def test_rows_that_exist_are_not_made_again(params, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(
        experiments.architectures,
        "run",
        lambda _, *key: runs.append(key) or {"der": 0.5, "failed": ""},
    )
    monkeypatch.setattr(experiments.architectures, "render", lambda _: yaml.dump({}))
    for only in (["vit"], ["vit", "vgg11"]):
        monkeypatch.setattr(
            sys,
            "argv",
            ["architectures", str(tmp_path / "rows.csv"), "--seeds", "0", "1", "--only", *only],
        )
        main()
    assert runs == [
        ("vit", "badnets", 0),
        ("vit", "badnets", 1),
        ("vgg11", "badnets", 0),
        ("vgg11", "badnets", 1),
    ]
    rows = read_rows(tmp_path / "rows.csv")
    assert len(rows) == 4 and all(row["made"] and row["device"] and row["torch"] for row in rows)


def test_the_summary_by_hand():
    row = dict.fromkeys(COLUMNS, "0") | {
        "architecture": "vit",
        "attack": "blend",
        "gate": "true",
        "failed": "",
    }
    lines = list(
        summary(
            [
                row | {"clean_accuracy_rnp_rebuild": "0.5"},
                row | {"clean_accuracy_rnp_rebuild": "0.7", "gate": "false", "neurons": "9"},
                row | {"architecture": "vgg11", "failed": "the loss became non-finite", "der": ""},
            ]
        )
    )
    assert (
        lines[2].startswith("| vit | blend | 2 | 1 of 2 | 0.000 |")
        and "| 0.500 | 0.000 | 0 of 0 |" in lines[2]
    )
    assert lines[3].startswith("| vgg11 | blend | 1 | 1 of 1 | the loss became non-finite |")
    assert len({line.count("|") for line in lines}) == 1
