"""`rnp table` counts the newest comparable runs and nothing else."""

import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from rnp.cli.main import cli
from rnp.errors import UserError
from rnp.io.files import read_rows, write_rows
from rnp.params.read import flatten, params_in_use
from rnp.params.schema import nest
from rnp.reporting.columns import COLUMNS, CONTROL_COLUMNS, DETECTION_COLUMNS
from rnp.reporting.rows import settings_digest
from rnp.reporting.table import cell, latest_comparable, mean_over_seeds


def row(
    attack="badnets",
    seed=0,
    asr=0.0,
    *,
    gate="true",
    made="2026-01-01",
    common="a",
    own="b",
    defense="rnp",
):
    values = dict.fromkeys(COLUMNS, "") | {
        "preset": "demo",
        "attack": attack,
        "defense": defense,
        "seed": str(seed),
        "gate": gate,
        "clean_accuracy_before": "0.9",
        "attack_success_rate_before": "1",
        "clean_accuracy": "0.8",
        "attack_success_rate": str(asr),
        "robust_accuracy": "0.7",
        "der": "0.95",
        "settings": f"{common}-{own}",
        "made": made,
    }
    return values


def test_mean_and_interval_over_seeds():
    (line,) = mean_over_seeds([row(seed=seed, asr=asr) for seed, asr in enumerate([0.1, 0.2, 0.3])])
    assert (
        line["attack_success_rate"] == pytest.approx(0.2)
        and line["seeds"] == 3
        and line["gate"] == "3 of 3"
    )
    assert line["attack_success_rate_interval"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
    assert mean_over_seeds([row()])[0]["attack_success_rate_interval"] is None, (
        "one seed has no spread"
    )


def test_digits():
    line = {
        "seconds": 123.45,
        "seconds_interval": 10.26,
        "l1": 99.99,
        "neurons_pruned": 3.2,
        "der": None,
    }
    assert [cell(line, name) for name in ("seconds", "l1", "neurons_pruned", "der")] == [
        "123.5 ± 10.3",
        "99.990",
        "3",
        "–",
    ]


def test_the_mean_over_attacks_leaves_out_those_that_are_not_real():
    rows = [
        row("badnets", asr=0.1),
        row("blend", asr=0.3),
        row("sig", asr=0.9, gate="false"),
        row("wanet", asr=0.9, gate="false"),
        row("wanet", 1, asr=0.9),
    ]
    lines = mean_over_seeds(rows)
    assert [line["attack"] for line in lines] == ["badnets", "blend", "sig", "wanet", "mean of 2"]
    assert lines[-1]["attack_success_rate"] == pytest.approx(0.2) and lines[3]["gate"] == "1 of 2"


@pytest.mark.parametrize(
    "old",
    [
        row(asr=1.0, made="2025-12-31"),  # the same run, made before
        row(seed=1, asr=1.0, common="x", made="2025-12-31"),  # another seed, other settings
        row(
            seed=1, asr=1.0, own="x", made="2025-12-31"
        ),  # another seed, other options of the attack
        row("blend", asr=1.0, common="x", made="2025-12-31"),  # another attack, other settings
    ],
)
def test_stale_rows_are_left_out(old):
    kept = [row(), row(seed=2), row("sig", own="c"), row(defense="ft", common="f")]
    current = latest_comparable([old, *kept])
    assert sorted(map(str, current)) == sorted(map(str, kept))


def digest(params, defense):
    """The settings of a row, from params.yaml."""
    return settings_digest(dict(flatten(params_in_use(nest(params)))), "sig", defense)


def test_settings_are_what_the_defense_uses():
    params = {
        "precision": "auto",
        "data.name": "shapes",
        "datasets.shapes.images": 9,
        "datasets.digits.size": 3,
        "poison.attack": "sig",
        "attacks.sig.amplitude": 1,
        "attacks.blend.alpha": 2,
        "recover.lr": 3,
        "defenses.ft.lr": 4,
        "seed": 0,
        "detect.labels": ["mm_bd"],
        "detect.mm_bd.steps": 5,
        "detect.consensus.steps": 6,
    }

    options = params.keys() - {"data.name", "poison.attack", "detect.labels"}

    def used(defense):
        before = digest(params, defense)
        return {name for name in options if digest(params | {name: 7}, defense) != before}

    shared = {"precision", "datasets.shapes.images", "attacks.sig.amplitude"}
    assert used("rnp") == shared | {"recover.lr"}
    assert used("ft") == shared | {"defenses.ft.lr"}
    assert used("none") == shared
    assert used("detect") == shared | {"detect.mm_bd.steps"}
    text = {name: str(value) for name, value in flatten(params_in_use(nest(params)))}
    assert settings_digest(text, "sig", "rnp") == digest(params, "rnp"), "text, as MLflow keeps it"


def test_from_files(tmp_path):
    write_rows(tmp_path / "one.csv", [row(), row("blend", asr=0.25)])
    write_rows(tmp_path / "two.csv", [row(made="2025-12-31", asr=1.0)])
    result = CliRunner().invoke(
        cli,
        [
            "table",
            *(str(tmp_path / f"{n}.csv") for n in ("one", "two")),
            "--csv",
            str(tmp_path / "t.csv"),
        ],
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        "| preset | defense | attack | seeds | gate | CA before | ASR before | CA | ASR |"
    )
    assert [line.split(" | ")[2] for line in lines[2:5]] == [
        "badnets",
        "blend",
        "mean of 2",
    ] and "0.125" in lines[4]
    assert "1 rows left out" in result.stderr
    assert read_rows(tmp_path / "t.csv")[1]["attack_success_rate"] == "0.25"


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    result = CliRunner().invoke(cli, ["table", str(tmp_path / "x.csv")])
    assert isinstance(result.exception, UserError) and "is no table of `rnp collect`" in str(
        result.exception
    )


def cells(output):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()]


def test_a_table_of_detection(tmp_path):
    """A line per task, detector, model and setting over runs that are real; what a task does not
    measure is a dash.
    """
    empty = dict.fromkeys(DETECTION_COLUMNS, "") | {
        "preset": "demo",
        "seed": "0",
        "gate": "true",
        "setting": "test",
    }
    labels = [
        empty
        | {
            "attack": attack,
            "task": "labels",
            "detector": "mm_bd",
            "model": "backdoored",
            "label_correct": right,
        }
        for attack, right in (("badnets", "true"), ("blend", "false"))
    ]
    samples = [
        empty
        | {
            "attack": attack,
            "task": "samples",
            "detector": "strip",
            "model": "backdoored",
            "auroc": auroc,
            "gate": gate,
        }
        for attack, auroc, gate in (
            ("badnets", "0.8", "true"),
            ("blend", "0.9", "true"),
            ("sig", "0.1", "false"),
        )
    ]
    filtering = empty | {
        "attack": "blend",
        "task": "samples",
        "detector": "strip",
        "model": "backdoored",
        "setting": "training",
        "auroc": "0.4",
    }
    write_rows(tmp_path / "detection.csv", [*labels, *samples, filtering])
    result = CliRunner().invoke(
        cli, ["table", str(tmp_path / "detection.csv")], catch_exceptions=False
    )
    table = cells(result.output)
    assert table[2][:8] == ["demo", "labels", "mm_bd", "backdoored", "test", "2", "1 of 2", "–"]
    assert table[3][:8] == ["demo", "samples", "strip", "backdoored", "test", "2", "–", "0.850"]
    assert (
        table[4][:8] == ["demo", "samples", "strip", "backdoored", "training", "1", "–", "0.400"]
        and len(table) == 5
    )


def test_one_measure_by_attack(tmp_path):
    write_rows(
        tmp_path / "t.csv",
        [row("wanet", asr=0.2), row("badnets", asr=0.1), row("badnets", asr=0.9, defense="ft")],
    )
    result = CliRunner().invoke(
        cli,
        ["table", str(tmp_path / "t.csv"), "--measure", "attack_success_rate"],
        catch_exceptions=False,
    )
    assert cells(result.output) == [
        ["preset", "defense", "badnets", "wanet", "mean of 2"],
        ["---"] * 5,
        ["demo", "ft", "0.900", "–", "–"],
        ["demo", "rnp", "0.100", "0.200", "0.150"],
    ]


def test_a_table_of_controls(tmp_path):
    """Amounts in the order of numbers; another kind of table beside it is refused."""
    empty = dict.fromkeys(CONTROL_COLUMNS, "") | {
        "preset": "demo",
        "seed": "0",
        "gate": "true",
        "control": "defense_size",
        "model": "backdoored",
    }
    write_rows(
        tmp_path / "c.csv",
        [
            empty
            | {
                "attack": attack,
                "amount": amount,
                "attack_success_rate": asr,
                "neurons_pruned": 7,
            }
            for attack, amount, asr in (
                ("badnets", 100, 0.1),
                ("blend", 100, 0.2),
                ("badnets", 50, 0.3),
            )
        ],
    )
    lines = cells(
        CliRunner().invoke(cli, ["table", str(tmp_path / "c.csv")], catch_exceptions=False).output
    )
    table = [dict(zip(lines[0], line)) for line in lines[2:]]
    assert [
        [line[name] for name in ("amount", "runs", "ASR", "CA", "pruned")] for line in table
    ] == [["50", "1", "0.300", "–", "7"], ["100", "2", "0.150", "–", "7"]]
    write_rows(tmp_path / "d.csv", [dict.fromkeys(DETECTION_COLUMNS, "")])
    result = CliRunner().invoke(cli, ["table", *(str(tmp_path / f"{name}.csv") for name in "cd")])
    assert isinstance(result.exception, UserError) and "cannot be combined" in str(result.exception)


def test_one_measure_of_detection_by_attack(tmp_path):
    """Only the lines that have it; of labels how many runs named the right one."""
    empty = dict.fromkeys(DETECTION_COLUMNS, "") | {
        "preset": "demo",
        "gate": "true",
        "setting": "test",
        "model": "backdoored",
    }
    write_rows(
        tmp_path / "d.csv",
        [
            *(
                empty
                | {
                    "attack": "badnets",
                    "seed": seed,
                    "task": "labels",
                    "detector": "mm_bd",
                    "label_correct": right,
                }
                for seed, right in (("0", "true"), ("1", "false"))
            ),
            *(
                empty
                | {
                    "attack": attack,
                    "seed": "0",
                    "task": "samples",
                    "detector": "strip",
                    "auroc": auroc,
                }
                for attack, auroc in (("sig", "0.5"), ("badnets", "0.9"))
            ),
        ],
    )

    def show(measure):
        return CliRunner().invoke(cli, ["table", str(tmp_path / "d.csv"), "--measure", measure])

    assert cells(show("auroc").output)[2:] == [
        ["demo", "samples", "strip", "backdoored", "test", "0.900", "0.500"]
    ]
    assert cells(show("label_correct").output)[2:] == [
        ["demo", "labels", "mm_bd", "backdoored", "test", "1 of 2", "–"]
    ]
    error = show("auruc").exception
    assert (
        isinstance(error, UserError)
        and str(error) == "--measure: no measure 'auruc'; did you mean 'auroc'?"
    )
    write_rows(
        tmp_path / "d.csv",
        [
            empty
            | {
                "attack": "badnets",
                "seed": "0",
                "task": "labels",
                "detector": "mm_bd",
                "gate": "false",
            }
        ],
    )
    assert len(cells(show("auroc").output)) == 2, "no run is real: a head and no lines"


def test_the_published_table_of_detection_has_the_columns_of_today():
    rows = read_rows(Path(__file__).parents[2] / "results/cifar10-fast/detection.csv")
    assert tuple(rows[0]) == DETECTION_COLUMNS and {row["setting"] for row in rows} <= {
        "test",
        "training",
    }
