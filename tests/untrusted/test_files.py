"""`rnp purify` and `rnp inspect` as a defender types them, and the files that they write."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from rnp.cli.main import cli, guard
from rnp.defenses.rnp_rebuild import UNANIMITY
from rnp.detection.base import RecoveredTrigger
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.latent_trigger import LatentTrigger
from rnp.detection.labels.trigger_size import TriggerSize
from rnp.io.files import sha256
from rnp.untrusted.audit import DETECTORS

REBUILD = "--rebuild.steps 3 --rebuild.batch-size 20".split()
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def run(command, scene, *options):
    arguments = [str(scene / "model.safetensors"), "--clean", str(scene / "clean")]
    result = CliRunner().invoke(
        cli, [command, *arguments, *map(str, options)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def options(quick):
    return [*quick.model, *quick.unlearn, *quick.recover, *quick.search]


@pytest.fixture(scope="module")
def purified(scene, options, tmp_path_factory):
    """The folder and the output of a command without rebuilding."""
    out = tmp_path_factory.mktemp("purified") / "out"
    return out, run("purify", scene, "-o", out, "--tuning-rounds", 0, *options)


def test_what_is_written(purified):
    out, _ = purified
    assert sorted(os.listdir(out)) == [
        "masks.csv",
        "modelcard.md",
        "purified.safetensors",
        "report.html",
        "report.json",
    ]


def test_only_scales_of_the_pruned_neurons_change(purified, scene):
    out, _ = purified
    before, after = load_file(scene / "model.safetensors"), load_file(out / "purified.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    report = json.loads((out / "report.json").read_text())
    assert changed == {
        f"{layer.removeprefix('net.')}.weight" for layer in report["prune"]["layers"]
    }
    zeros = sum(int(((after[name] == 0) & (before[name] != 0)).sum()) for name in changed)
    assert zeros == report["prune"]["pruned"]


def test_the_report_holds_what_was_measured(purified, scene):
    out, output = purified
    report = json.loads((out / "report.json").read_text())
    model = scene / "model.safetensors"
    assert report["inputs"] == {str(model): sha256(model)}
    assert report["outputs"] == {
        name: sha256(out / name) for name in ("purified.safetensors", "masks.csv")
    }
    assert report["images"] == {
        "source": str(scene / "clean"),
        "train_images": 30,
        "all_images": 60,
        "labeled": True,
        "skipped": 0,
    }
    names = sorted(os.listdir(scene / "clean"))
    assert report["classes"] == {str(i): name for i, name in enumerate(names)}
    assert report["model"]["num_classes"] == 4
    assert report["accuracy_before"]["n"] == 60 and report["cost"]["n"] == 30
    assert report["seed"] == 0
    low, high = report["cost"]["interval"]
    assert low < report["cost"]["value"] < high
    assert high - low > 0.05, "thirty images cannot tell more"
    assert set(report["labels"]) == {*(detector.name for detector in DETECTORS), UNANIMITY}
    assert report["versions"]["rnp"]
    assert report["settings"]["recover"]["steps"] == 4
    assert report["command"].split()[0] == "rnp"
    assert "Any trigger" in report["not_tested"][0]
    pruned = report["prune"]
    assert f"pruned {pruned['pruned']} of {pruned['neurons']} neurons" in output


def test_the_page_and_the_card(purified):
    out, _ = purified
    page, card = (out / "report.html").read_text(), (out / "modelcard.md").read_text()
    assert "bird&lt;b&gt;" in page and "bird<b>" not in page
    assert "No triggered image was tested" in page
    assert ">memory layout</th>" in page and "memory_layout" not in page
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"""(src|href)=["']?(?!data:)\w""", page)
    digest = sha256(out / "purified.safetensors")
    assert digest in page and digest in card
    assert "Any trigger" in card and "| before |" in card
    assert "All other weights are unchanged" in card and "16 x 16 pixels" in card
    for text in (page, card):  # what was measured, never a promise
        assert not re.search(r"\b(is|now|model) (clean|safe|backdoor-free)\b", text, re.I)


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_the_page_opens_in_a_browser(purified, tmp_path):
    out, _ = purified
    probe = (
        "<script>document.title = [...document.images].filter(i => i.complete && i.naturalWidth >"
        " 100).length + ' pictures'</script>"
    )
    text = (out / "report.html").read_text().replace("</body>", f"{probe}</body>")
    (tmp_path / "page.html").write_text(text)
    result = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "<title>4 pictures</title>" in result.stdout, result.stderr[-500:]


def test_rebuilding_is_reported_everywhere(scene, options, tmp_path, monkeypatch):
    """In the terminal, the report, the card and the page."""
    monkeypatch.setattr(Consensus, "score_unlearned", lambda *_: 2 * torch.eye(4)[0])
    monkeypatch.setattr(LatentTrigger, "leads", lambda *_: torch.zeros(4, 4, dtype=torch.float64))
    monkeypatch.setattr(TriggerSize, "from_triggers", lambda *_: torch.zeros(4))
    out = tmp_path / "out"
    output = run("purify", scene, "-o", out, "--tuning-rounds", 1, *options, *REBUILD)
    assert "neurons, then rebuilt against triggers of bird<b>; accuracy" in output
    assert "; smallest trigger of bird<b> " in output
    report = json.loads((out / "report.json").read_text())
    assert report["tuned_against"] == ["bird<b>"] and report["settings"]["tuning_rounds"] == 1
    assert set(report["trigger_sizes"]["bird<b>"]) == {"before", "after"}
    card, page = (out / "modelcard.md").read_text(), (out / "report.html").read_text()
    assert "misled by the triggers recovered for bird<b>. The smallest trigger of" in card
    assert "All other weights" not in card
    assert "misled by the triggers recovered for bird&lt;b&gt;" in page and "bird<b>" not in page
    before = load_file(scene / "model.safetensors")
    after = load_file(out / "purified.safetensors")
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])


def test_without_evidence_the_model_is_rebuilt_against_no_trigger(
    scene, options, tmp_path, monkeypatch
):
    """No trigger is smaller than another, in the pixels or in the features."""
    monkeypatch.setattr(RecoveredTrigger, "effective_size", 5.0)
    monkeypatch.setattr(Consensus, "score_unlearned", lambda *_: torch.zeros(4))
    monkeypatch.setattr(LatentTrigger, "leads", lambda *_: torch.zeros(4, 4, dtype=torch.float64))
    output = run("purify", scene, "-o", tmp_path / "out", *options, *REBUILD)
    assert "rebuilt against" not in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tuned_against"] == []
    card, page = ((tmp_path / "out" / name).read_text() for name in ("modelcard.md", "report.html"))
    assert "outputs of the given model on the clean images again." in card
    assert "No label was suspicious enough" in page


def test_inspection_changes_nothing(scene, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*quick.model, *quick.unlearn, *quick.search]
    assert "label by prediction_drift" in run("inspect", scene, *options)
    assert os.listdir() == []
    run("inspect", scene, *options, "-o", "report")
    assert sorted(os.listdir("report")) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--max-images", "19"], "model.max_images must be at least 20, got 19"),
        (["--pseudo-label-confidence", "1"], r"pseudo_label_confidence must be in \[0, 1\)"),
        (["--mean", "a,b"], "--mean takes numbers"),
        (["--class-names", "a,b"], "4 outputs, but 2 classes are named"),
        (["--class-names", "a,b,c,d"], "images of class"),
        (["--arch", "resnet18"], "another architecture"),
        (["--tuning-rounds", "-1"], "tuning_rounds must be 0 or more, got -1"),
    ],
)
def test_mistakes_end_in_one_line(scene, tmp_path, quick, change, words, capsys):
    arguments = [str(scene / "model.safetensors"), "--clean", str(scene / "clean")]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end, guard():
        cli(["purify", *arguments, "-o", str(out), *quick.model, *change], standalone_mode=False)
    message = capsys.readouterr().err
    assert end.value.code == 2 and re.search(words, message)
    assert message.count("\n") == 1 and not out.exists()


@pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated",
    "ignore:.*Any type hint is inferred as AnyType",
)
def test_a_run_in_mlflow_when_wanted(scene, options, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    out = tmp_path / "out"
    output = run("purify", scene, "-o", out, "--mlflow", "--tuning-rounds", 0, *options)
    assert "failed" not in output
    client = mlflow.MlflowClient(store)
    (logged,) = client.search_runs([client.get_experiment_by_name("rnp").experiment_id])
    report = json.loads((out / "report.json").read_text())
    assert logged.data.metrics["prune/pruned"] == report["prune"]["pruned"]
    assert logged.data.params["recover.steps"] == "4"
    files = {file.path for file in client.list_artifacts(logged.info.run_id)}
    assert {"report.html", "purified.safetensors", "plots"} <= files
    plots = {file.path for file in client.list_artifacts(logged.info.run_id, "plots")}
    assert plots == {f"plots/{name}.png" for name in ("masks", "sweep", "triggers", "unlearning")}
