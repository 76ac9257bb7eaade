"""The summary of a population: ROC, false alarms, backdoors named, by hand; and which models a
folder has.
"""

import pytest
import yaml

from experiments.population import summary, to_read
from rnp.errors import UserError
from rnp.io.files import write_json


def rows(kind, values, threshold, right=()):
    return [
        {
            "kind": kind,
            "gate": "" if kind == "benign" else "true",
            "detector": "some",
            "score": str(value),
            "named": str(value >= threshold).lower(),
            "label_correct": str(i in right).lower(),
        }
        for i, value in enumerate(values)
    ]


def test_the_summary_by_hand():
    """Of 2 x 4 pairs 7 are in the right order, three of the four are above 0.575.

    A model that failed the gate does not count.
    """
    benign, bad = (
        rows("benign", [0.1, 0.6], 0.5),
        rows("backdoored", [0.3, 0.7, 0.8, 0.9], 0.5, right=(1, 3)),
    )
    failed = rows("backdoored", [0.0], 0.5)[0] | {"gate": "false"}
    _, _, line = summary([*benign, *bad, failed])
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["some", "2", "4", "0.875"] and cells[5:] == ["0.75", "2", "1", "3", "2"]
    low, high = map(float, cells[4].split(" to "))
    assert 0.5 <= low <= 0.875 <= high == 1


def left_behind(folder, **values):
    """The files of a pipeline that stopped after `benign`; `values` change its params.yaml."""
    for name, content in {
        "benign/run.json": {"params": {"seed": 3}},
        "benign/metrics.json": {"clean_accuracy": 0.5},
    }.items():
        write_json(folder / "reports" / name, content)
    (folder / "models").mkdir()
    (folder / "models" / "benign.safetensors").touch()
    params = {
        "preset": "demo",
        "seed": 3,
        "poison": {"attack": "blend"},
        "train": {"augment": {"crop": 0, "flip": False}},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params | values))
    return folder


def test_a_folder_gives_the_models_that_it_has(tmp_path):
    candidates = to_read(left_behind(tmp_path))
    assert [candidate.identity for candidate in candidates] == [
        {"preset": "demo", "kind": "benign", "seed": 3, "attack": ""}
    ]


def test_a_folder_of_other_parameters_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"benign ran with seed 3, params.yaml says 4"):
        list(to_read(left_behind(tmp_path, seed=4)))
