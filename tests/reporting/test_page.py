"""The page: complete, honest, self-contained, and tolerant of stages that did not run."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from rnp.errors import UserError
from rnp.evaluation.controls import EXPERIMENTS
from rnp.reporting.page import CONTROLS, number, page

HOSTILE = "</td><script>alert('\"x\"')</script>"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)


def scores(ca: float, asr: float, ra: float, der: float) -> dict:
    return {"clean_accuracy": ca, "attack_success_rate": asr, "robust_accuracy": ra, "der": der}


def evaluation(**changes: object) -> dict:
    models = {
        "backdoored": scores(0.887, 1.0, 0.0, 0.5),
        "rnp": scores(0.878, 0.024, 0.851, 0.984),
        "benign": scores(0.891, 0.008, 0.88, 0.99),
        HOSTILE: scores(0.86, 0.05, float("nan"), 0.96),
    }
    return {
        **models["rnp"],
        "clean_accuracy_before": 0.887,
        "attack_success_rate_before": 1.0,
        "robust_accuracy_before": 0.0,
        "intervals": {"clean_accuracy": [0.863, 0.892], "attack_success_rate": [0.018, 0.032]},
        "n_clean": 2000,
        "n_triggered": 1800,
        "gate": True,
        "gate_reason": "",
        "attack": "badnets",
        "safe_window": 0.12,
        "oracle": {**scores(0.872, 0.007, 0.86, 0.98), "neurons_pruned": 41},
        "models": models,
        **changes,
    }


def write(folder: Path, name: str, value: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def html(reports: Path, params: dict) -> str:
    page(reports, params, reports / "report.html")
    return (reports / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """What a complete run leaves, with one hostile name wherever a name can come from outside."""
    write(
        tmp_path / "unlearn", "metrics.json", {"reached": True, "stop_step": 45, "accuracy": 0.487}
    )
    write(tmp_path / "recover", "metrics.json", {"accuracy": 0.872, "neurons": 4800})
    write(
        tmp_path / "prune",
        "metrics.json",
        {
            "pruned": 37,
            "lost": 0.018,
            "accuracy": 0.879,
            "threshold": 0.31,
            "rule": "accuracy_drop",
            "neurons": 4800,
            "layers": {HOSTILE: 37},
        },
    )
    write(
        tmp_path / "detect",
        "metrics.json",
        {
            "triggers": {"unlearned": {"success": 0.97, "l1": 7.1}},
            "labels": {HOSTILE: {"label": None, "margin": 0.1, "correct": False}},
            "benign_labels": {"mm_bd": {"label": -1, "margin": 0.1, "correct": True}},
            "training_samples": {"training_loss": {"auroc": 0.913}},
            "samples": {"strip": {"auroc": 0.912}, "loss_gap": {"auroc": 0.99, "base_rate": 0.47}},
        },
    )
    write(tmp_path / "evaluate", "metrics.json", evaluation())
    for stage, seconds in {"unlearn": 10, "recover": 20, "prune": 45.5, "defend/ft": 3}.items():
        write(tmp_path / stage, "run.json", {"stage": stage, "seconds": seconds})
    for figure in ("evaluate/pruning", "unlearn/unlearning", 'prune/a"><b>', "defend/ft/own"):
        (tmp_path / f"{figure}.png").write_bytes(PNG)
    return tmp_path


def test_numbers_come_with_counts_and_intervals(reports: Path) -> None:
    text = html(reports, {"seed": 3})
    assert (
        "RNP pruned 37 of 4,800 neurons; the accuracy on the defender&#39;s own images changed by"
        " -0.018." in text
    )
    assert (
        "The attack success rate fell from 1.000 to 0.024 on 1,800 triggered test images (95\u00a0%"
        " interval 0.018 to 0.032)." in text
    )
    assert (
        "The clean accuracy shows no change beyond the interval: 0.887 before, 0.878 on 2,000 clean"
        " test images" in text
    )
    assert "never backdoored sends 0.008 of these images" in text
    assert "oracle (41 neurons pruned)" in text and "unattainable for a defender" in text
    assert "1 min 16 s" in text  # RNP's three stages
    assert "adaptive attacks" in text and "one run with seed 3" in text


def test_the_work_of_rnp_is_the_sum_of_its_stages(reports: Path) -> None:
    """A backward pass costs as much as two forward passes."""
    write(reports / "unlearn", "metrics.json", {"multiply_adds_per_image": 100})
    work = {"multiply_adds_forward": 500_000, "multiply_adds_backward": 400_000}
    for stage in ("unlearn", "recover", "prune"):
        write(reports / stage, "run.json", {"stage": stage, "seconds": 1.0} | work)
    text = html(reports, {})
    assert "RNP: 15,000 forward, 6,000 backward passes" in text
    assert text.count("<td>5,000 forward, 2,000 backward</td>") == 3


def test_no_word_promises_more_than_was_measured(reports: Path) -> None:
    words = re.sub(r"<style>.*?</style>|<[^>]+>", " ", html(reports, {}), flags=re.DOTALL).lower()
    assert not re.search(
        r"\b(safe|secure|guarantee\w*|removed the backdoor|backdoor-free|is clean)\b",
        words.replace("safe_window", ""),
    )


def test_page_stands_alone(reports: Path) -> None:
    text = html(reports, {"seed": 0})
    sources = re.findall(r"<img[^>]*?src=\"([^\"]*)\"", text)
    assert len(sources) == 4 and all(
        source == f"data:image/png;base64,{base64.b64encode(PNG).decode()}" for source in sources
    )
    assert all(re.search(r'alt="[^"]+"', image) for image in re.findall(r"<img[^>]*>", text))
    for outside in ("http", "//", "<script", "<link", "@import", "url(", "<iframe"):
        assert outside not in re.sub(r"base64,[^\"]*", "", text)


def test_hostile_names_are_text(reports: Path) -> None:
    text = html(reports, {"poison": {"attack": HOSTILE, HOSTILE: HOSTILE}, "seed": HOSTILE})
    assert "<script" not in text and "alert(" in text
    assert "<b>" not in text


def test_gate_banner(reports: Path) -> None:
    assert "not real" not in html(reports, {})
    write(
        reports / "evaluate",
        "metrics.json",
        evaluation(gate=False, gate_reason="ASR 0.312 is below 0.8"),
    )
    text = html(reports, {})
    assert 'role="alert"' in text and "not real" in text and "ASR 0.312 is below 0.8" in text


def test_gate_of_training_counts_before_evaluation(tmp_path: Path) -> None:
    write(
        tmp_path / "train", "metrics.json", {"gate": False, "gate_reason": "ASR 0.1 is below 0.8"}
    )
    assert "ASR 0.1 is below 0.8" in html(tmp_path, {})


def test_stop_that_was_not_reached_is_said(reports: Path) -> None:
    write(reports / "unlearn", "metrics.json", {"reached": False, "stop_step": 7, "accuracy": 0.7})
    assert "The stop was never reached." in html(reports, {})


def test_a_rise_is_called_a_rise(reports: Path) -> None:
    write(reports / "evaluate", "metrics.json", evaluation(attack_success_rate_before=0.01))
    assert "The attack success rate rose from 0.010 to 0.024" in html(reports, {})


def test_labels_and_methods_are_all_listed(reports: Path) -> None:
    text = html(reports, {})
    assert (
        "no decision" in text
        and "0.912" in text
        and "0.913" in text
        and "a false alarm" in text
        and "loss gap" in text
        and "size (pixels)" in text
    )


def test_every_control_experiment_is_shown(reports: Path) -> None:
    assert list(CONTROLS) == list(EXPERIMENTS)
    rows = {name: {"benign, 5": {"der": 0.5}} for name in EXPERIMENTS}
    write(reports / "controls", "metrics.json", rows)
    text = html(reports, {})
    assert text.count("benign, 5") >= len(EXPERIMENTS) and "RNP with darker, noisy images." in text


def test_the_parameters_in_use_are_shown(reports: Path) -> None:
    params = {
        "data": {"name": "shapes"},
        "poison": {"attack": "sig"},
        "attacks": {"sig": {"frequency": 6}, "blend": {"alpha": 0.2}},
    }
    text = html(reports, params)
    assert "Attack: badnets." in text, "the one that was evaluated"
    assert "Data: shapes." in text
    assert "attacks.sig.frequency" in text and "attacks.blend.alpha" not in text


def test_an_audited_model_has_its_own_section(tmp_path: Path) -> None:
    accuracy = {"value": 0.9, "n": 200, "interval": [0.85, 0.94]}
    audit = {
        "warnings": ["the images have no labels"],
        "accuracy_before": accuracy,
        "accuracy_after": accuracy | {"value": 0.89},
        "cost": accuracy | {"value": 0.01, "n": 100, "turned_wrong": 2, "turned_right": 1},
        "tuned_against": ["cat"],
        "settings": {"tuning_rounds": 3},
        "images": {"source": "images"},
        "model": {"architecture": HOSTILE},
        "classes": {0: "cat"},
        "skipped": [],
        "inputs": {"model.pth": "0" * 64},
        "outputs": {},
        "command": "rnp purify model.pth",
        "seed": 0,
        "not_tested": ["Triggers that cover the whole image."],
    }
    page(tmp_path, {}, tmp_path / "report.html", audit=audit)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'role="alert"' in text and "the images have no labels" in text
    assert "0.900" in text and "200 of the images given" in text and "-0.010 in accuracy" in text
    assert "Triggers that cover the whole image." in text and "adaptive attacks" not in text
    assert "<script" not in text


def test_its_own_earlier_run_does_not_change_the_page(reports: Path) -> None:
    before = html(reports, {})
    write(reports / "report", "run.json", {"stage": "report", "seconds": 777})
    assert html(reports, {}) == before


@pytest.mark.parametrize("gone", ["unlearn", "recover", "prune", "detect", "evaluate", "defend"])
def test_absent_stages_are_left_out(reports: Path, gone: str) -> None:
    (reports / gone).rename(reports.parent / f"{reports.name}-{gone}")
    assert "Undefined" not in html(reports, {})


def test_without_any_stage_nothing_is_claimed(tmp_path: Path) -> None:
    text = html(tmp_path, {})
    assert (
        "No triggered image was tested." in text and "<img" not in text and "fell from" not in text
    )


def test_same_files_same_bytes(reports: Path) -> None:
    assert html(reports, {"seed": 0}) == html(reports, {"seed": 0})


def test_damaged_metrics_leave_the_old_page(reports: Path) -> None:
    before = html(reports, {})
    (reports / "detect" / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        page(reports, {}, reports / "report.html")
    assert (reports / "report.html").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    "value, shown",
    [
        (0.5, "0.500"),
        (0.0, "0.000"),
        (1e-4, "0.0001"),
        (12345.0, "1.23e+04"),
        (float("nan"), "–"),
        (None, "–"),
        (True, "yes"),
        (4800, "4,800"),
        ([10, 0.5], "10, 0.500"),
        ([], "–"),
        ("a", "a"),
    ],
)
def test_number(value: object, shown: str) -> None:
    assert number(value) == shown
