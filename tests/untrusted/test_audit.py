"""A stranger's file and a folder of images, through `rnp purify` and `rnp inspect`, as a defender
types them.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import rnp
from rnp.cli.main import cli, guard
from rnp.defenses.rnp_ft import RNPFT
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.evaluation.metrics import paired_interval
from rnp.io.datasets import save_defense_set
from rnp.io.files import read_rows, sha256
from rnp.io.models import save_model
from rnp.models.build import Architecture
from rnp.recover import Recover
from rnp.training.recipe import Train
from rnp.types import DefenseSet
from rnp.unlearn import Unlearn
from rnp.untrusted.spec import ModelSpec

QUICK = [
    "--unlearn.epochs",
    "6",
    "--unlearn.lr",
    "0.05",
    "--recover.steps",
    "4",
    "--search.steps",
    "3",
    "--search.batch_size",
    "2",
]
NET = [
    "--arch",
    "resnet10",
    "--width",
    "4",
    "--mean",
    "0.5,0.5,0.5",
    "--std",
    "0.25,0.25,0.25",
    "--size",
    "16",
]
NAMES = ("bird<b>", "class1", "class2", "class3")


@pytest.fixture(scope="module")
def scene(tmp_path_factory, toy_set, rng):
    """model.safetensors with a network's own names, clean/CLASS/*.png, and a pipeline's model with
    its defense set.
    """
    folder = tmp_path_factory.mktemp("stranger")
    architecture, half, quarter = (
        Architecture(arch="resnet10", width=4),
        torch.full((3,), 0.5),
        torch.full((3,), 0.25),
    )
    model = architecture.build(4, 3, half, quarter, rng=rng())
    Train(epochs=6, batch_size=16, lr=0.1, precision="fp32")(
        model, toy_set(160, size=16), rng=rng()
    )
    save_file(
        {name: value.contiguous() for name, value in model.net.state_dict().items()},
        folder / "model.safetensors",
    )
    data = toy_set(60, size=16, seed=5)
    for i, (image, label) in enumerate(zip(data.images, data.labels)):
        (folder / "clean" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(
            folder / "clean" / NAMES[label] / f"{i}.png"
        )
    save_model(folder / "backdoored.safetensors", model, architecture, data.classes)
    save_defense_set(folder / "defense", DefenseSet(data, toy_set(60, size=16, seed=6)))
    return folder


@pytest.fixture(scope="module")
def purified(scene):
    done = CliRunner().invoke(
        cli,
        [
            "purify",
            str(scene / "model.safetensors"),
            "--clean",
            str(scene / "clean"),
            "-o",
            str(scene / "out"),
            "--rounds",
            "0",
            *NET,
            *QUICK,
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    return scene / "out", done.output


def test_what_is_written(purified):
    out, _ = purified
    assert sorted(file.name for file in out.iterdir()) == [
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
    assert report["inputs"] == {
        str(scene / "model.safetensors"): sha256(scene / "model.safetensors")
    }
    assert report["outputs"] == {
        name: sha256(out / name) for name in ("purified.safetensors", "masks.csv")
    }
    assert report["images"] | {"source": ""} == {
        "source": "",
        "optimized on": 30,
        "chosen with": 60,
        "labeled": True,
        "skipped": 0,
    }
    assert (
        report["classes"] == {str(i): name for i, name in enumerate(NAMES)}
        and report["model"]["outputs"] == 4
    )
    assert (
        report["accuracy_before"]["n"] == 60 and report["cost"]["n"] == 30 and report["seed"] == 0
    )
    low, high = report["cost"]["interval"]
    assert low < report["cost"]["value"] < high and high - low > 0.05, (
        "thirty images cannot tell more"
    )
    assert (
        set(report["labels"])
        == {"consensus", "trigger_survival", "prediction_drift", "neural_cleanse_index"}
        and report["versions"]["rnp"]
    )
    assert report["settings"]["recover"]["steps"] == 4 and "Any trigger" in report["not_tested"][0]
    assert f"pruned {report['prune']['pruned']} of {report['prune']['neurons']} neurons" in output


def test_the_page_and_the_card(purified):
    out, _ = purified
    page, card = (out / "report.html").read_text(), (out / "modelcard.md").read_text()
    assert (
        "bird&lt;b&gt;" in page
        and "bird<b>" not in page
        and "No triggered image was tested" in page
    )
    assert page.count("data:image/png;base64,") == 4 and not re.search(
        r"""(src|href)=["']?(?!data:)\w""", page
    )
    digest = sha256(out / "purified.safetensors")
    assert digest in page and digest in card and "Any trigger" in card and "| before |" in card
    for text in (page, card):  # design: what was measured, never a promise
        assert not re.search(r"\b(is|now|model) (clean|safe|backdoor-free)\b", text, re.I)


@pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")), reason="needs Chromium"
)
def test_the_page_opens_in_a_browser(purified, tmp_path):
    out, _ = purified
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    probe = (
        "<script>document.title = [...document.images].filter(i => i.complete && i.naturalWidth >"
        " 100).length + ' pictures'</script>"
    )
    (tmp_path / "page.html").write_text(
        (out / "report.html").read_text().replace("</body>", f"{probe}</body>")
    )
    done = subprocess.run(
        [
            browser,
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
    assert "<title>4 pictures</title>" in done.stdout, done.stderr[-500:]


def test_the_result_is_the_pipelines(scene, tmp_path):
    """With the defense set that the pipeline's stages read, the same settings and the same seed."""
    model, defense = scene / "backdoored.safetensors", scene / "defense"
    unlearn = ["--lr", "0.05", "--epochs", "6"]
    for arguments in (
        [
            "unlearn",
            "--model",
            model,
            "--defense",
            defense,
            "--out",
            tmp_path / "u",
            *unlearn,
            "--seed",
            3,
        ],
        [
            "recover",
            "--unlearned",
            tmp_path / "u",
            "--defense",
            defense,
            "--out",
            tmp_path / "r",
            "--steps",
            4,
            "--seed",
            3,
        ],
        [
            "prune",
            "--model",
            model,
            "--masks",
            tmp_path / "r",
            "--defense",
            defense,
            "--out",
            tmp_path / "p",
        ],
    ):
        done = CliRunner().invoke(
            cli,
            [*map(str, arguments), "--report", str(tmp_path / "reports" / arguments[0])],
            catch_exceptions=False,
        )
        assert done.exit_code == 0, done.output
    result = rnp.purify(
        model,
        defense,
        tmp_path / "out",
        seed=3,
        unlearn=Unlearn(lr=0.05, epochs=6),
        recover=Recover(steps=4),
        search=NeuralCleanse(steps=2, batch_size=2),
        tuning_rounds=0,
        prune=rnp.cli.examination.Prune(),
    )
    assert result["outputs"]["purified.safetensors"] == sha256(tmp_path / "p" / "model.safetensors")
    assert (tmp_path / "out" / "masks.csv").read_bytes() == (
        tmp_path / "r" / "mask.csv"
    ).read_bytes()


def test_a_label_that_is_left_open_is_tuned_against(scene, tmp_path, monkeypatch):
    """After the pruning, and the page, the card and the terminal say so."""
    monkeypatch.setattr(RNPFT, "suspicious", lambda _, triggers: triggers[:1])
    monkeypatch.setattr(PredictionDrift, "from_trajectory", lambda *_: torch.tensor([1.0, 0.0]))
    sizes = iter(
        [5.0, 5.0, 5.0, 5.0, 1.0]
    )  # of the four classes in the given model, and of the first in the pruned one
    monkeypatch.setattr("rnp.defenses.rnp_ft.size", lambda _: next(sizes))
    done = CliRunner().invoke(
        cli,
        [
            "purify",
            str(scene / "model.safetensors"),
            "--clean",
            str(scene / "clean"),
            "-o",
            str(tmp_path / "out"),
            "--rounds",
            "1",
            *NET,
            *QUICK,
        ],
        catch_exceptions=False,
    )
    assert (
        done.exit_code == 0
        and "neurons, then tuned against triggers of bird<b>; accuracy" in done.output
    )
    report, card = (
        json.loads((tmp_path / "out/report.json").read_text()),
        (tmp_path / "out/modelcard.md").read_text(),
    )
    assert report["tuned_against"] == ["bird<b>"] and report["settings"]["rounds"] == 1
    assert "tuned, in at most 1 short rounds" in card and "All other weights" not in card
    page = (tmp_path / "out/report.html").read_text()
    assert (
        "tuned, in at most 1 short rounds, against triggers recovered for bird&lt;b&gt;" in page
        and "bird<b>" not in page
    )
    before, after = (
        load_file(scene / "model.safetensors"),
        load_file(tmp_path / "out/purified.safetensors"),
    )
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])


def test_negative_rounds_are_refused(scene, tmp_path):
    with pytest.raises(UserError, match="rounds must be 0 or more, got -1"):
        rnp.purify(scene / "model.safetensors", scene / "clean", tmp_path / "out", tuning_rounds=-1)


def test_inspection_changes_nothing(scene, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "inspect",
        str(scene / "model.safetensors"),
        "--clean",
        str(scene / "clean"),
        *NET,
        *QUICK[:4],
        *QUICK[6:],
    ]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "label by class_shares" in done.output and os.listdir() == []
    done = CliRunner().invoke(cli, [*arguments, "-o", "report"], catch_exceptions=False)
    assert done.exit_code == 0 and sorted(os.listdir("report")) == ["report.html", "report.json"]


def test_images_without_labels(scene, tmp_path):
    """The model's own confident answers serve, and the report says so."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (scene / "clean").rglob("*.png"):
        shutil.copy(file, flat)
    subject = ModelSpec(
        arch="resnet10", width=4, mean="0.5,0.5,0.5", std="0.25,0.25,0.25", size=16, confidence=0.3
    )
    result = rnp.inspect(
        scene / "model.safetensors",
        flat,
        subject=subject,
        unlearn=Unlearn(lr=0.05, epochs=6),
        search=NeuralCleanse(steps=2, batch_size=2),
    )
    assert not result["images"]["labeled"] and "no labels" in result["warnings"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--size", "9", "--images", "19"], "images must be at least 20, got 19"),
        (["--confidence", "1"], r"confidence must be in \[0, 1\)"),
        (["--mean", "a,b"], "--mean takes numbers"),
        (["--classes", "a,b"], "4 outputs, but 2 classes are named"),
        (["--classes", "a,b,c,d"], "images of class"),
        (["--arch", "resnet18"], "another architecture"),
    ],
)
def test_mistakes_end_in_one_line(scene, tmp_path, change, words, capsys):
    with pytest.raises(SystemExit) as end, guard():
        cli(
            [
                "purify",
                str(scene / "model.safetensors"),
                "--clean",
                str(scene / "clean"),
                "-o",
                str(tmp_path / "out"),
                *NET,
                *change,
            ],
            standalone_mode=False,
        )
    said = capsys.readouterr().err
    assert (
        end.value.code == 2
        and re.search(words, said)
        and said.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


def test_too_few_images(scene, tmp_path):
    with pytest.raises(UserError, match="gives 15 usable images, at least 20 are needed"):
        rnp.inspect(
            scene / "model.safetensors",
            scene / "clean" / "class1",
            subject=ModelSpec(
                arch="resnet10",
                width=4,
                mean="0.5,0.5,0.5",
                std="0.25,0.25,0.25",
                size=16,
                confidence=0,
            ),
        )


def test_the_package_lends_two_functions():
    assert callable(rnp.purify) and callable(rnp.inspect)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rnp.nothing


def test_the_paired_interval_in_closed_form():
    """(12 - 5) / 102 with a variance of (17 / 102 - (7 / 102)^2) / 102."""
    low, high = paired_interval(11, 4, 100)
    half = 1.959964 * ((17 / 102 - (7 / 102) ** 2) / 102) ** 0.5
    assert (low, high) == pytest.approx((7 / 102 - half, 7 / 102 + half))
    low, high = paired_interval(0, 0, 10)
    assert low == -high and high > 0, "no image turned, yet ten do not prove that none would"


def tiny(num_classes):
    """GroupNorm, as a stranger's own module may have it."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, num_classes),
    )


class Viewing(torch.nn.Module):
    """Flattens with `view`, as most published networks for CIFAR do."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 12, 3, 4), torch.nn.BatchNorm2d(12)
        self.fc = torch.nn.Linear(192, num_classes)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(x.view(x.size(0), -1))


def viewing(num_classes):
    return Viewing(num_classes)


@pytest.mark.parametrize(
    ("arch", "classes"),
    [(f"{__name__}:tiny", 2), (f"{__name__}:viewing", 2), ("mobilenet_v2", 43), ("vgg19_bn", 10)],
)
def test_other_architectures_and_numbers_of_classes(
    arch, classes, tmp_path, toy_set, rng, monkeypatch
):
    """Fresh weights: near chance, which is said; every step works all the same."""
    monkeypatch.setattr("rnp.models.build.REGISTERED", {})
    size = 16 if ":" in arch else 32
    subject = ModelSpec(
        arch=arch,
        width=0 if ":" in arch else 2,
        mean="0.5,0.5,0.5",
        std="0.25,0.25,0.25",
        size=size,
    )
    rnp.models.build.typed(arch)
    half = torch.full((3,), 0.5)
    model = Architecture(arch=arch, width=subject.width).build(classes, 3, half, half, rng=rng())
    save_file(
        {name: value.contiguous() for name, value in model.net.state_dict().items()},
        tmp_path / "a.safetensors",
    )
    data = toy_set(60, classes=2, size=size)
    rows = ["path,label"]
    for i, (image, label) in enumerate(zip(data.images, data.labels)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{label}")
    (tmp_path / "clean.csv").write_text("\n".join(rows))
    result = rnp.purify(
        tmp_path / "a.safetensors",
        tmp_path / "clean.csv",
        tmp_path / "out",
        subject=subject,
        unlearn=Unlearn(epochs=2),
        recover=Recover(steps=2),
        search=NeuralCleanse(steps=2, batch_size=2),
    )
    assert result["model"]["outputs"] == classes and len(result["classes"]) == classes
    plain = result["model"]["memory layout"] != "channels last"
    assert plain == arch.endswith("viewing"), result["model"]["memory layout"]
    assert (tmp_path / "out" / "purified.safetensors").exists() and result["prune"]["neurons"] > 10
    assert classes == 2 or any("no image of class" in warning for warning in result["warnings"])


@pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated",
    "ignore:.*Any type hint is inferred as AnyType",
)
def test_a_run_in_mlflow_when_asked(scene, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    done = CliRunner().invoke(
        cli,
        [
            "purify",
            str(scene / "model.safetensors"),
            "--clean",
            str(scene / "clean"),
            "-o",
            str(tmp_path / "out"),
            "--mlflow",
            *NET,
            *QUICK,
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0 and "failed" not in done.output
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("rnp").experiment_id])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        run.data.metrics["prune/pruned"] == report["prune"]["pruned"]
        and run.data.params["recover.steps"] == "4"
    )
    assert {"report.html", "purified.safetensors", "plots"} <= {
        file.path for file in client.list_artifacts(run.info.run_id)
    }


def detect(scene, task, *rest):
    return CliRunner().invoke(
        cli,
        [
            "detect",
            task,
            str(scene / "model.safetensors"),
            "--clean",
            str(scene / "clean"),
            *NET,
            *QUICK[:4],
            *QUICK[6:],
            *map(str, rest),
        ],
        catch_exceptions=False,
    )


def test_labels_of_a_strangers_model(scene):
    """A line per detector, and one more where it is asked of the unlearned model too."""
    done = detect(scene, "labels", "--by", "prediction_drift", "--by", "neural_cleanse_index")
    lines = done.output.splitlines()
    assert done.exit_code == 0 and [line.split(":")[0] for line in lines[-4:-1]] == [
        "prediction_drift",
        "neural_cleanse_index",
        "neural_cleanse_index_unlearned",
    ]
    assert (
        all(re.search(r": (no decision|class \d \(.+\)), margin \d", line) for line in lines[-4:-1])
        and "not a proof" in lines[-1]
    )


def test_triggers_of_a_strangers_model(scene, tmp_path):
    """One per class, the smallest first."""
    done = detect(scene, "triggers", "-o", tmp_path / "found")
    rows = read_rows(tmp_path / "found/triggers.csv")
    assert done.exit_code == 0 and {row["class"] for row in rows} == set(NAMES)
    sizes = [float(row["l1"]) for row in rows]
    assert sizes == sorted(sizes) and load_file(tmp_path / "found/triggers.safetensors")[
        "mask"
    ].shape == (4, 16, 16)
    assert (tmp_path / "found/triggers.png").read_bytes().startswith(b"\x89PNG")
    assert (
        f"class {rows[0]['label']} ({rows[0]['class']}): {sizes[0]:.1f} pixels"
        in done.output.splitlines()[-4]
    )


def test_images_that_a_stranger_sends(scene, tmp_path):
    """A row for each readable one, in the order of their names; flags are scores above the
    defender's own limit.
    """
    for name in ("b", "a", "c"):
        shutil.copy(next((scene / "clean" / "class1").iterdir()), tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    done = detect(
        scene,
        "samples",
        tmp_path,
        "-o",
        tmp_path / "out.csv",
        "--by",
        "unlearned_confidence",
        "--by",
        "strip",
        "--by",
        "mean_unlearned_confidence",
    )
    assert done.exit_code == 0, done.output
    rows = read_rows(tmp_path / "out.csv")
    assert [Path(row["path"]).name for row in rows] == [
        "a.png",
        "b.png",
        "c.png",
    ] and "broken.png" in done.output
    assert len({row["unlearned_confidence"] for row in rows}) == 1 and {
        row["confidence_flagged"] for row in rows
    } <= {"true", "false"}
    flagged = sum(row["confidence_flagged"] == "true" for row in rows)
    assert f"confidence: {flagged} of 3 images flagged" in done.output and "strip: " in done.output


def test_an_unknown_task_of_detection(scene):
    done = CliRunner().invoke(cli, ["detect", "lables", "model.pth"])
    assert done.exit_code == 2 and "No such command 'lables'" in done.output
