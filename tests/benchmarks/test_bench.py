"""The logic of the benchmark: fits, medians, merging, tables, the published procedure; nothing is
timed.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import reference_rnp, suite
from benchmarks.measure import MEASURES
from benchmarks.measure_published import oracle
from benchmarks.report import FOUR_TASKS, SECTIONS, headline, markdown, number
from benchmarks.scaling import draw, exponent, exponents
from benchmarks.subprocesses import Failed, measure, median, peak_memory, repeat
from benchmarks.timing import with_clock
from rnp.cli.main import cli
from rnp.clock import Clock
from rnp.neurons.masks import prune
from rnp.recover import Recover

ROOT = Path(__file__).parents[2]

MACHINE = {"name": "a machine", "cores": 2, "memory_gib": 8.0, "bf16": False}


def part(runs, device="cpu", **more):
    return {
        "made": "2025-01-01 00:00",
        "commit": "0123456789",
        "device": device,
        "machine": MACHINE,
        "threads": 2,
        "versions": {"python": "3", "torch": "2"},
        "subject": "demo",
        "quick": False,
        "load": 0.0,
        "runs": runs,
    } | more


def scaled():
    """Costs that are known powers: recover grows with the images, prune with the square of the
    width.
    """
    runs = {"subject/16x32": [{"seconds": 1.0}]}
    for axis, values in suite.AXES.items():
        for value in values:
            tried = 1000 * value if axis == "max_fraction" else 50
            seconds = {
                "unlearn": 0.1,
                "recover": 0.01 * value,
                "prune": tried if axis == "max_fraction" else value**2,
            }
            for phase, taken in seconds.items():
                runs[f"{axis}/{value}/{phase}"] = [
                    {"seconds": taken, "seconds_per_step": taken, "tried": tried, "peak": 2**30}
                ]
    return runs


def full():
    """A record with every part, some of it failed."""
    numbers = {"seconds": 2.0, "peak": 2**30, "images_per_second": 50.0}
    ours = numbers | {
        "phases": {"unlearn": 1.0},
        "precision": ["fp32"],
        "n_clean": 10,
        "n_triggered": 9,
        "clean_accuracy": 0.9,
    }
    theirs = numbers | {
        "seconds": 60.0,
        "extrapolated": False,
        "recover_epochs": 40,
        "recover_steps": 80,
        "stopped": True,
        "own_unlearn_steps": 52,
        "own_seconds": 70.0,
    }
    stages = [
        {"stage": name, "seconds": 3.0, "work": work, "peak": 2**29}
        for name, work in (("prepare", 1.0), ("publish", None))
    ]
    runs = {
        "start": {"stage, tracking on": [{"seconds": 2.5}], "import torch": [{"seconds": 1.0}]},
        "train": {
            "plain": [numbers],
            "ours": [numbers | {"images_per_second": value} for value in (90.0, 200.0, 100.0)],
        },
        "waiting": {
            "ours, alone": [{"milliseconds": 40.0, "steps": 100}],
            "untouched, alone": [{"milliseconds": 41.0, "steps": 99}],
        },
        "poison": {
            "badnets": [numbers | {"changed": 5000, "stamp_seconds": 0.1, "copies": 1.5}],
            "lira": {"failed": "exit code 1: why"},
        },
        "rnp": {
            "ours": [ours],
            "ours, fp32": [ours | {"seconds": 5.0}],
            "ours, rebuilt": [ours | {"seconds": 6.0}],
            "ours, rebuilt, fp32": [ours | {"seconds": 10.0}],
            "published": [theirs],
        },
        "defenses": {"rnp": [numbers], "ft": [numbers]},
        "detectors": {key: [numbers] for key in FOUR_TASKS.values()},
        "demo": {"pipeline": [{"seconds": 100.0, "setup_seconds": 5.0, "stages": stages}]},
        "noop": {"repro": [{"seconds": 1.5}]},
        "scaling": scaled(),
    }
    record = {}
    for name, of_part in runs.items():
        more = {"exponents": exponents(of_part)} if name == "scaling" else {}
        record = suite.merge(record, name, part(of_part, **more))
    return record


@pytest.mark.parametrize("b", [-1.0, 0.0, 0.5, 2.0])
def test_the_exponent_of_a_power_law_is_found(b):
    x = [100, 250, 500, 1000]
    assert exponent(x, [3 * v**b for v in x]) == pytest.approx(b, abs=1e-9)


def test_one_point_has_no_exponent():
    assert math.isnan(exponent([16, 16], [1.0, 2.0]))


def test_exponents_of_known_costs():
    fits = exponents(scaled())
    assert fits["images"] == pytest.approx({"unlearn": 0, "recover": 1, "prune": 2}, abs=1e-9)
    assert fits["tried"] == pytest.approx({"prune": 1})


def test_what_failed_has_no_median_and_the_rest_is_repeated():
    calls = []

    def fail():
        raise Failed("why")

    runs = repeat(
        {"good": lambda: {"seconds": float(len(calls)), "at": calls.append(1)}, "bad": fail}, 3
    )
    assert [result["seconds"] for result in runs["good"]] == [0.0, 1.0, 2.0] and runs["bad"] == {
        "failed": "why"
    }
    assert (
        median(runs, "good", "seconds") == 1.0
        and median(runs, "bad", "seconds") is median(runs, "none", "seconds") is None
    )


def test_a_part_takes_the_place_of_its_older_numbers_and_of_no_other(monkeypatch):
    record = suite.merge(
        suite.merge({}, "train", full()["parts"]["train"]),
        "noop",
        part({"repro": [{"seconds": 4.0}]}, made="old"),
    )
    new = part({"repro": [{"seconds": 2.0}]}, made="new", threads=4)
    after = suite.merge(record, "noop", new)
    assert after["parts"]["noop"] == new and after["parts"]["train"] == record["parts"]["train"]
    assert (
        after["seconds"] == {"noop_repro": 2.0}
        and after["threads"] == 4
        and after["ratio"]["train_vs_fp32"] == {"cpu": 2.0}
    )
    both = suite.merge(
        after,
        "train",
        part({"plain": [{"images_per_second": 1.0}], "ours": [{"images_per_second": 5.0}]}, "cuda"),
    )
    assert both["ratio"]["train_vs_fp32"] == {"cpu": 2.0, "cuda": 5.0} and set(both["parts"]) == {
        "train",
        "noop",
        "train_cuda",
    }
    assert suite.failures(both, ["train"]) == []


def test_a_failed_part_says_so_and_gives_no_number():
    failed = {name: value for name, value in part({}).items() if name != "runs"} | {
        "failed": "the disk is full"
    }
    record = suite.merge(full(), "train", failed)
    assert record["ratio"]["train_vs_fp32"] == {} and "**Failed**: the disk is full" in markdown(
        record, picture="p.png"
    )
    assert suite.failures(record, ["train", "poison"]) == ["train", "poison/lira"]


def test_headline():
    numbers = headline(full()["parts"])
    measured = {name: values for name, values in numbers["ratio"].items() if values}
    assert measured == {
        "rnp_vs_published": {"cpu": 30.0},
        "rnp_fp32_vs_published": {"cpu": 12.0},
        "rnp_rebuilt_vs_published": {"cpu": 10.0},
        "rnp_rebuilt_fp32_vs_published": {"cpu": 6.0},
        "train_vs_fp32": {"cpu": 2.0},
    }
    assert numbers["seconds"] == {"stage_start": 2.5, "noop_repro": 1.5, "demo_pipeline": 100.0}


def test_the_page_shows_every_part():
    record = json.loads(json.dumps(full()))
    page = markdown(record, picture="../docs/scaling.png")
    assert all(f"## {title}" in page for title, _ in SECTIONS.values()) and set(SECTIONS) == set(
        suite.PARTS
    )
    assert (
        "| lira | – | – | – | – | failed |" in page and "**Failed**: lira: exit code 1: why" in page
    )
    assert (
        "(../docs/scaling.png)" in page and "| **sum** | 8 |" in page and "extrapolated" not in page
    )
    widths = [
        {line.count("|") for line in block.splitlines() if line.startswith("|")}
        for block in page.split("\n\n")
    ]
    assert all(len(width) <= 1 for width in widths), (
        "rows of a table have as many cells as its head"
    )


def test_an_extrapolated_number_is_named_so():
    record = full()
    record["parts"]["rnp"]["runs"]["published"][0]["extrapolated"] = True
    assert "**extrapolated**" in markdown(record, picture="")


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (0.000012, "0.0000"),
        (0.0123, "0.0123"),
        (1.5, "1.5"),
        (12345.6, "12,346"),
        (100.4, "100"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_the_picture_is_drawn(tmp_path):
    draw(tmp_path / "scaling.png", part(scaled(), exponents=exponents(scaled())))
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 1000 and picture.convert("L").getextrema()[0] < 128


def test_the_published_sweep_is_cumulative_and_rounds_to_four_decimals(
    trained, tmp_path, unchanged
):
    masks = {
        "bn1": torch.tensor([0.0, 0.30004, 0.05, *[1.0] * 5]),
        "bn2": torch.tensor([0.3, 0.31, *[0.95] * 6]),
    }
    reference_rnp.write_masks(tmp_path / "masks.txt", masks)
    swept = {
        t: (n, {k: v.clone() for k, v in model.state_dict().items()})
        for t, n, model in reference_rnp.sweep(unchanged(trained), tmp_path / "masks.txt")
    }
    assert list(swept) == [i / 20 for i in range(19)] and [
        swept[t][0] for t in (0.0, 0.05, 0.25, 0.3, 0.35, 0.9)
    ] == [1, 2, 2, 4, 5, 5]
    ours = prune(trained, [("bn1", 0), ("bn1", 2), ("bn2", 0), ("bn1", 1)]).state_dict()
    assert all(torch.equal(swept[0.3][1][name], value) for name, value in ours.items())


def test_published_evaluation(trained, toy_set):
    data = toy_set(40)
    loss, accuracy = reference_rnp.evaluate(
        trained.train(), DataLoader(TensorDataset(data.as_floats(), data.labels), batch_size=16)
    )
    logits = trained.eval()(data.as_floats())
    assert accuracy == (logits.argmax(1) == data.labels).float().mean().item()
    assert loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, data.labels).item(), rel=1e-5
    )


def test_the_readers_choice_costs_at_most_two_points():
    points = [
        {"clean_accuracy": ca, "attack_success_rate": asr}
        for ca, asr in ((0.9, 1.0), (0.885, 0.2), (0.87, 0.0))
    ]
    assert oracle(points, 0.9) == points[1] and oracle(points[2:], 0.9) == points[2]


def test_the_published_page_is_what_its_numbers_give():
    record = json.loads((ROOT / "results/bench.json").read_text())
    page = (ROOT / "results/bench.md").read_text()
    assert markdown(record, picture="../docs/scaling.png") == page


def test_a_step_of_rnp_is_timed_and_gives_the_same(trained, toy_set, rng):
    """`with_clock` changes neither the options nor the result."""
    clock = Clock()
    recover = Recover(steps=2)
    timed = with_clock(recover, clock, "recover")
    assert isinstance(timed, Recover) and vars(timed) == vars(recover)
    masks = [step(trained, toy_set(40), rng=rng()).mask for step in (recover, timed)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert list(clock.seconds) == ["recover"] and clock.seconds["recover"] > 0


def test_peak_is_of_this_process():
    assert 2**24 < peak_memory() < 2**36


def test_a_failed_measurement_says_why():
    assert "train_plain" in MEASURES
    with pytest.raises(Failed, match="KeyError: 'nothing'"):
        measure("nothing")


def test_an_unknown_part_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["bench", "--only", "trian"])
    assert (
        "unknown part 'trian'; did you mean 'train'?" in str(result.exception)
        and list(tmp_path.iterdir()) == []
    )


def test_without_a_checkout_it_says_what_it_needs(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    assert "needs a checkout" in str(CliRunner().invoke(cli, ["bench"]).exception)


def test_a_part_is_run_and_written(tmp_path, monkeypatch):
    """The command, with a part that measures nothing."""
    monkeypatch.setitem(
        suite.PARTS,
        "noop",
        lambda fixtures: repeat({"repro": lambda: {"seconds": 1.5}}, fixtures.repeats),
    )
    files = [
        word
        for name in ("json", "page")
        for word in (f"--{name}", str(tmp_path / "results" / name))
    ]
    result = CliRunner().invoke(cli, ["bench", "--only", "noop", "--repeats", "2", *files])
    assert result.exit_code == 0, result.exception
    record = json.loads((tmp_path / "results/json").read_text())
    assert (
        record["seconds"] == {"noop_repro": 1.5}
        and len(record["parts"]["noop"]["runs"]["repro"]) == 2
    )
    assert (
        record["parts"]["noop"]["machine"] == record["machine"]
        and "Nothing to do" in (tmp_path / "results/page").read_text()
    )


def test_a_measurement_may_have_an_argument_called_name(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "benchmarks.subprocesses.call", lambda *words: asked.append(words) or '{"seconds": 1}'
    )
    assert measure("poison", name="badnets") == {"seconds": 1} and json.loads(asked[0][-1]) == {
        "name": "badnets"
    }
