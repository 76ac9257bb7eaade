"""An audit in memory: what it measures, that it equals the pipeline, and that it writes nothing."""

import dataclasses
import os
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import rnp
from rnp.cli.main import cli
from rnp.defenses.rnp_rebuild import EVIDENCE, UNANIMITY
from rnp.detection.labels.consensus import Consensus
from rnp.errors import UserError
from rnp.io.files import sha256
from rnp.models.build import Architecture, register_function
from rnp.prune import Prune
from rnp.rebuild import Rebuild
from rnp.recover import Recover
from rnp.unlearn import Unlearn
from rnp.untrusted.audit import DETECTORS

# As the user's own module, these are named in --arch


def tiny(num_classes):
    """GroupNorm, as a network that is not ours may have it."""
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


class Viewing(nn.Module):
    """Flattens with `view`, as most published networks for CIFAR do."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, 4)
        self.norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(192, num_classes)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(x.view(x.size(0), -1))


def viewing(num_classes):
    return Viewing(num_classes)


def with_softmax(num_classes):
    """The network of the scene, with a softmax at its end and under the same names."""
    half = torch.full((3,), 0.5)
    architecture = Architecture(arch="resnet10", width=4)
    net = architecture.build(num_classes, 3, half, half, rng=torch.Generator()).net
    net.register_forward_hook(lambda *arguments: arguments[-1].softmax(1))
    return net


def snapshot(folder):
    """Every file and folder below, with its time of change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def frozen_scene(scene, tmp_path, monkeypatch):
    """The scene; nothing may be written into it, the working directory or a temporary folder."""
    for name in ("work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = snapshot(scene)
    yield scene
    assert snapshot(scene) == before
    assert os.listdir(tmp_path / "work") == os.listdir(tmp_path / "temporary") == []


def test_purify_in_memory_writes_nothing(frozen_scene, quick):
    report = rnp.purify(
        frozen_scene / "model.safetensors",
        frozen_scene / "clean",
        spec=quick.spec,
        tuning_rounds=0,
        **quick.methods,
        **quick.repair,
    )
    assert report.repair is not None
    assert report.repair.pruned.chosen.pruned == len(report.repair.pruned.neurons)
    with torch.no_grad():
        images = torch.rand(2, 3, 16, 16)
        assert report.repair.model(images).shape == report.loaded.model(images).shape == (2, 4)
    given = report.loaded.model.state_dict()
    changed = [
        name
        for name, value in report.repair.model.state_dict().items()
        if not torch.equal(value, given[name])
    ]
    assert {name.removesuffix(".weight") for name in changed} == {
        layer for layer, _ in report.repair.pruned.neurons
    }


def test_inspect_in_memory_writes_nothing(frozen_scene, quick):
    report = rnp.inspect(
        str(frozen_scene / "model.safetensors"),
        str(frozen_scene / "clean"),
        spec=quick.spec,
        **quick.methods,
    )
    assert report.repair is None and report.accuracy.n == 60
    followed = [*(detector.name for detector in EVIDENCE), UNANIMITY]
    assert list(report.labels)[:4] == followed
    assert set(report.labels) == {*(detector.name for detector in DETECTORS), UNANIMITY}
    assert [trigger.label for trigger in report.triggers] == [0, 1, 2, 3]


def test_the_result_equals_the_pipelines(scene, tmp_path, quick):
    """With the defense set that the pipeline's stages read, the same settings and the same seed."""
    model, defense = scene / "backdoored.safetensors", scene / "defense"
    folders = {stage: tmp_path / stage for stage in ("unlearn", "recover", "prune")}
    stages = {
        "unlearn": f"--model {model} --lr 0.05 --epochs 6 --seed 3",
        "recover": f"--unlearned {folders['unlearn']} --steps 4 --seed 3",
        "prune": f"--model {model} --masks {folders['recover']}",
    }
    for stage, options in stages.items():
        report = tmp_path / "reports" / stage
        paths = f"--defense {defense} --out {folders[stage]} --report {report} --precision fp32"
        arguments = [stage, *options.split(), *paths.split()]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    methods = quick.methods | quick.repair | {"prune": Prune()}
    rnp.purify(model, defense, out=out, seed=3, tuning_rounds=0, **methods)
    assert sha256(out / "purified.safetensors") == sha256(folders["prune"] / "model.safetensors")
    assert (out / "masks.csv").read_bytes() == (folders["recover"] / "mask.csv").read_bytes()


def test_files_written_by_the_library_are_those_of_the_command(scene, tmp_path, quick):
    arguments = [
        *("purify", str(scene / "model.safetensors"), "--clean", str(scene / "clean")),
        *("-o", str(tmp_path / "command"), "--tuning-rounds", "0", "--search.steps", "2"),
        *("--search.batch-size", "2", "--precision", "fp32"),
        *(*quick.model, *quick.unlearn, *quick.recover),
    ]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rnp.purify(
        scene / "model.safetensors",
        scene / "clean",
        spec=quick.spec,
        tuning_rounds=0,
        out=tmp_path / "library",
        **quick.methods,
        **quick.repair,
    )
    assert sorted(os.listdir(tmp_path / "command")) == sorted(os.listdir(tmp_path / "library"))
    for name in ("purified.safetensors", "masks.csv"):
        assert sha256(tmp_path / "command" / name) == sha256(tmp_path / "library" / name)


def test_an_evident_label_is_rebuilt_against(scene, quick, monkeypatch):
    """After pruning; the given model stays as it is."""
    monkeypatch.setattr(Consensus, "score_unlearned", lambda *_: 2 * torch.eye(4)[0])
    report = rnp.purify(
        scene / "model.safetensors",
        scene / "clean",
        spec=quick.spec,
        tuning_rounds=1,
        **quick.methods,
        **quick.repair | {"rebuild": Rebuild(steps=3)},
    )
    assert report.repair is not None and 0 in report.repair.tuned_labels
    weight = "net.conv1.weight"
    given = report.loaded.model.state_dict()[weight]
    assert torch.equal(report.repair.pruned.model.state_dict()[weight], given)
    assert not torch.equal(report.repair.model.state_dict()[weight], given)


def test_negative_rounds_are_refused(scene):
    with pytest.raises(UserError, match=r"purify\.tuning_rounds must be 0 or more, got -1"):
        rnp.purify(scene / "model.safetensors", scene / "clean", tuning_rounds=-1)


def test_images_without_labels(scene, tmp_path, quick):
    """The model's own confident predictions serve, and the report says so."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (scene / "clean").rglob("*.png"):
        shutil.copy(file, flat)
    spec = dataclasses.replace(quick.spec, pseudo_label_confidence=0.3)
    report = rnp.inspect(scene / "model.safetensors", flat, spec=spec, **quick.methods)
    assert not report.images.labeled and "no labels" in report.warnings[0]


def test_a_network_that_gives_probabilities(scene, quick, monkeypatch):
    """Its logarithms are used, and the report says so; the verdicts are those of its logits."""
    monkeypatch.setattr("rnp.models.build.REGISTERED", {})
    report = rnp.purify(
        scene / "model.safetensors",
        scene / "clean",
        spec=dataclasses.replace(quick.spec, arch=f"{__name__}:with_softmax", width=0),
        **quick.methods,
        **quick.repair | {"rebuild": Rebuild(steps=2)},
    )
    plain = rnp.inspect(
        scene / "model.safetensors", scene / "clean", spec=quick.spec, **quick.methods
    )
    assert any("gives probabilities" in warning for warning in report.warnings)
    assert not any("gives probabilities" in warning for warning in plain.warnings)
    assert report.accuracy == plain.accuracy
    one, other = (r.unlearned.trajectory for r in (report, plain))
    assert [row.accuracy for row in one] == [row.accuracy for row in other]
    images = torch.rand(2, 3, 16, 16)
    assert torch.allclose(report.repair.model.net(images).sum(1), torch.ones(2), atol=1e-5)


def test_a_file_without_counters_of_batches(scene, quick, tmp_path):
    """As PyTorch wrote them before 0.4.1; one that lacks only some is refused."""
    weights = load_file(scene / "model.safetensors")
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    old = {name: value for name, value in weights.items() if name not in counters}
    save_file(old, tmp_path / "old.safetensors")
    save_file(old | {counters[0]: weights[counters[0]]}, tmp_path / "damaged.safetensors")

    def inspect(file):
        return rnp.inspect(file, scene / "clean", spec=quick.spec, **quick.methods)

    assert (
        inspect(tmp_path / "old.safetensors").accuracy
        == inspect(scene / "model.safetensors").accuracy
    )
    with pytest.raises(UserError, match=r"lacks tensor .*num_batches_tracked"):
        inspect(tmp_path / "damaged.safetensors")


def test_too_few_images(scene, quick):
    with pytest.raises(UserError, match="gives 15 usable images, at least 20 are needed"):
        rnp.inspect(
            scene / "model.safetensors",
            scene / "clean" / "class1",
            spec=dataclasses.replace(quick.spec, pseudo_label_confidence=0),
        )


def test_an_ascent_that_does_not_reach_its_stop_is_reported(scene, quick):
    report = rnp.inspect(
        scene / "model.safetensors",
        scene / "clean",
        spec=quick.spec,
        unlearn=Unlearn(epochs=1, lr=1e-6),
        search=quick.methods["search"],
    )
    assert re.search("never fell to 0.5 in 1 steps", report.warnings[-1])


@pytest.mark.parametrize(
    ("arch", "classes"),
    [(f"{__name__}:tiny", 2), (f"{__name__}:viewing", 2), ("mobilenet_v2", 43), ("vgg19_bn", 10)],
)
def test_other_architectures_and_numbers_of_classes(
    arch, classes, tmp_path, toy_set, rng, quick, monkeypatch
):
    """Fresh weights: near chance, which a warning says; every step works all the same."""
    monkeypatch.setattr("rnp.models.build.REGISTERED", {})
    is_ours = ":" not in arch
    size = 32 if is_ours else 16
    width = 2 if is_ours else 0
    spec = dataclasses.replace(quick.spec, arch=arch, width=width, image_size=size)
    register_function(arch)
    half = torch.full((3,), 0.5)
    model = Architecture(arch=arch, width=width).build(classes, 3, half, half, rng=rng())
    weights = {name: value.contiguous() for name, value in model.net.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    data = toy_set(60, classes=2, size=size)
    rows = ["path,label"]
    for i, (image, label) in enumerate(zip(data.images, data.labels)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{label}")
    (tmp_path / "clean.csv").write_text("\n".join(rows))
    report = rnp.purify(
        tmp_path / "a.safetensors",
        tmp_path / "clean.csv",
        out=tmp_path / "out",
        spec=spec,
        tuning_rounds=1,
        unlearn=Unlearn(epochs=2),
        recover=Recover(steps=2),
        rebuild=Rebuild(steps=2),
        search=quick.methods["search"],
    )
    assert report.model.num_classes == len(report.classes) == classes
    is_contiguous = report.model.memory_layout != "channels last"
    assert is_contiguous == arch.endswith("viewing"), report.model.memory_layout
    assert (tmp_path / "out" / "purified.safetensors").exists()
    assert report.repair is not None
    assert sum(map(len, report.repair.recovered.mask.values())) > 10
    assert any("no image of class" in warning for warning in report.warnings) == (classes > 2)
    skipped = [detector for detector in DETECTORS if classes < detector.min_classes]
    judged = {d.name for d in DETECTORS if d not in skipped}
    together = {UNANIMITY} if judged >= {d.name for d in EVIDENCE} else set()
    assert report.labels.keys() == judged | together
    assert len(skipped) == sum("classes and was not run" in line for line in report.warnings)


def test_the_package_lends_its_nouns():
    for name in (
        "RNP",
        "RNPFT",
        "RNPRebuild",
        "purify",
        "inspect",
        "load_model",
        "ImageSet",
        "DefenseSet",
    ):
        assert name in rnp.__all__ and name in dir(rnp) and callable(getattr(rnp, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(rnp, "nothing")  # noqa: B009
