"""CIFAR-10 in parts and back, stages without DVC, and a campaign after a kill; no stage runs."""

import hashlib
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from torchvision.datasets import CIFAR10

from benchmarks import campaign, parcel
from benchmarks.pipeline import fill, parameters, read_pipeline, stages
from rnp.errors import UserError
from rnp.io.files import write_text
from rnp.params.read import read_params

ROOT = Path(__file__).parents[2]
PIPELINE = read_pipeline()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Files as CIFAR-10 has them, of noise; two and a half strips each."""
    folder, draw = tmp_path / "given" / CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch():
        return {
            "labels": draw.integers(10, size=5).tolist(),
            "filenames": ["a"] * 5,
            "data": draw.integers(256, size=(5, 3072)).astype(np.uint8),
        }

    monkeypatch.setattr(CIFAR10, "train_list", [write("a", batch()), write("b", batch())])
    monkeypatch.setattr(CIFAR10, "test_list", [write("c", batch())])
    name, checksum = write("meta", {"names": ["cat"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "names", "md5": checksum})
    monkeypatch.setattr(parcel, "STRIP", 2)
    monkeypatch.setattr(parcel, "MIB", 2**10)
    monkeypatch.setenv("RNP_DATA", str(folder.parent))
    return folder


def test_parts_become_the_same_files(cifar, tmp_path):
    parcel.pack(tmp_path / "parts", 20 * 2**10)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 1
    for number, part in enumerate(parts):
        (tmp_path / str(number)).mkdir()
        part.rename(tmp_path / str(number) / part.name)
    folders = [tmp_path / str(number) for number in range(len(parts))]
    parcel.unpack(folders, tmp_path / "made")
    for file in cifar.iterdir():
        assert (
            tmp_path / "made" / CIFAR10.base_folder / file.name
        ).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match=r"missing|no part"):
        parcel.unpack(folders[1:], tmp_path / "less")


def test_damaged_files_are_not_packed(cifar, tmp_path):
    (cifar / "b").write_bytes((cifar / "b").read_bytes() + b".")
    with pytest.raises(UserError, match="b of CIFAR-10 is damaged"):
        parcel.pack(tmp_path / "parts", 2**20)
    assert not (tmp_path / "parts").exists()


def test_commands_are_those_of_dvc(tmp_path):
    params = parameters(
        "cifar10",
        seed=3,
        attack="input_aware",
        defenses=["rnp_ft", "bnp"],
        changes=["train.epochs=2"],
    )
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text(
        (ROOT / ".dvc" / "config").read_text().replace("[core]", "[core]\n    no_scm = true")
    )
    code = """if True:
        import json, dvc.repo
        print(json.dumps({
            stage.addressing: [stage.cmd, [*map(str, stage.deps)], [*map(str, stage.outs)]]
            for stage in dvc.repo.Repo().index.stages
        }))"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = yaml.safe_load(result.stdout)
    ours = stages(PIPELINE, params)
    assert set(ours) == {
        "prepare",
        "benign",
        "poison",
        "train",
        "unlearn",
        "recover",
        "prune",
        "defend@rnp_ft",
        "defend@bnp",
        "evaluate",
    }
    for name, stage in ours.items():
        command, deps, outs = expected[name]
        assert stage.command == command
        assert set(stage.deps) <= set(deps) and set(stage.outs) <= set(outs)


def test_parameters_are_those_of_the_preset_but_for_what_is_asked():
    params = parameters(
        "cifar10", seed=1, attack="blend", defenses=["ft", "bnp"], changes=["model.width=4"]
    )
    assert params["defenses"]["ft"]["steps"] == 2000 and list(params["defenses"]) == params[
        "evaluate"
    ]["defenses"] == ["ft", "bnp"]
    assert (
        params["seed"],
        params["poison"]["attack"],
        params["model"]["width"],
        params["train"]["epochs"],
    ) == (1, "blend", 4, 60)
    with pytest.raises(UserError, match=r"train.epoch"):
        parameters("cifar10", seed=1, attack="blend", defenses=["ft"], changes=["train.epoch=4"])
    with pytest.raises(UserError, match="unknown defense"):
        parameters("cifar10", seed=1, attack="blend", defenses=["tf"])


def test_names_are_replaced_by_their_values():
    values = {"key": "ft", "data": {"name": "shapes"}}
    assert fill("python -m stages.x ${data.name} --out a/${key}.b", values) == (
        "python -m stages.x shapes --out a/ft.b"
    )
    with pytest.raises(KeyError, match="poison"):
        fill("${poison.attack}", values)


def test_a_stage_runs_with_this_python():
    params = parameters("demo", seed=0, attack="sig", defenses=["ft"])
    poison = stages(PIPELINE, params)["poison"].arguments()
    assert poison[:4] == (sys.executable, "-m", "stages.poison", "sig")


@pytest.fixture
def planned(tmp_path):
    """`planned(*attacks)`: their tasks, below `tmp_path`."""

    def make(*attacks, seed=1, defenses=("ft",)):
        named = {"shared": "badnets", **dict(zip(attacks, attacks))}
        return campaign.plan(
            tmp_path,
            {
                name: parameters("demo", seed=seed, attack=attack, defenses=defenses)
                for name, attack in named.items()
            },
            PIPELINE,
        )

    return make


def test_attacks_share_data_and_benign_model(planned, tmp_path):
    tasks = {str(task): task for task in planned("badnets", "blend")}
    own = ("poison", "train", "unlearn", "recover", "prune", "defend@ft", "evaluate")
    assert list(tasks) == [
        "shared/prepare",
        "shared/benign",
        *(f"{attack}/{each}" for attack in ("badnets", "blend") for each in own),
    ]

    def needs(name):
        return {str(path.relative_to(tmp_path)) for path in tasks[name].needs}

    assert needs("shared/prepare") == set() and needs("shared/benign") == {
        "shared/reports/prepare/run.json"
    }
    assert needs("blend/poison") == {
        "shared/reports/prepare/run.json",
        "shared/reports/benign/run.json",
    }
    assert {"blend/reports/defend/ft/run.json", "blend/reports/prune/run.json"} <= needs(
        "blend/evaluate"
    )
    for name in (
        "data/pool",
        "data/defense",
        "data/test",
        "models/benign.safetensors",
        "reports/benign",
    ):
        assert (tmp_path / "blend" / name).resolve() == tmp_path / "shared" / name
    assert read_params(tmp_path / "blend/params.yaml")["poison"]["attack"] == "blend"


def test_a_folder_of_other_parameters_is_refused(planned):
    before = planned("badnets")
    assert planned("badnets") == before
    with pytest.raises(UserError, match="shared was made with other parameters"):
        planned("blend", seed=2)


def test_with_other_defenses_the_models_are_measured_again(planned, tmp_path):
    planned("badnets")
    for stage in ("train", "evaluate"):
        write_text(campaign.run_record(tmp_path / "badnets", stage), "{}")
    planned("badnets")
    assert campaign.run_record(tmp_path / "badnets", "evaluate").exists()
    tasks = planned("badnets", defenses=["ft", "bnp"])
    assert {task.stage for task in tasks if task.finished} == {"train"} and "defend@bnp" in {
        task.stage for task in tasks
    }
    assert read_params(tmp_path / "badnets/params.yaml")["evaluate"]["defenses"] == ["ft", "bnp"]


def fake(folder, stage, needs=(), fails=False, seconds=0.0):
    """A task that adds a line to `folder`/ran and, unless it fails, writes its report."""
    report = campaign.run_record(folder, stage)
    code = (
        "import pathlib, sys, time\nwith open('ran', 'a') as file:"
        f" file.write('{stage}\\n')\ntime.sleep({seconds})\nif {fails}: sys.exit('error:"
        f" why')\nreport = pathlib.Path({str(report)!r}); report.parent.mkdir(parents=True);"
        " report.write_text('{}')\n"
    )
    return campaign.Task(
        folder=folder,
        stage=stage,
        command=(sys.executable, "-S", "-c", code),
        needs=tuple(campaign.run_record(folder, each) for each in needs),
    )


def test_the_rest_runs_after_a_failure_and_again_only_what_is_left(tmp_path, capsys):
    good, after = fake(tmp_path, "good"), fake(tmp_path, "defend@x", needs=["good"])
    bad, never = fake(tmp_path, "bad", fails=True), fake(tmp_path, "never", needs=["bad"])
    left = campaign.work_off([never, bad, after, good], workers=2, seconds=60, env={})
    assert left == [never, bad] and sorted((tmp_path / "ran").read_text().split()) == [
        "bad",
        "defend@x",
        "good",
    ]
    assert f"{tmp_path.name}/bad FAILED, exit code 1: error: why" in capsys.readouterr().out
    assert (
        campaign.work_off(
            [never, fake(tmp_path, "bad"), after, good], workers=1, seconds=60, env={}
        )
        == []
    )
    assert (tmp_path / "ran").read_text().split()[3:] == ["bad", "never"]


def test_nothing_starts_when_time_is_up(tmp_path):
    task = fake(tmp_path, "late")
    assert (
        campaign.work_off([task], workers=1, seconds=0, env={}) == [task]
        and not (tmp_path / "ran").exists()
    )


def test_reports_of_whatever_has_ended_are_collected(planned, tmp_path):
    planned("badnets")
    for name in (
        "shared/reports/benign/run.json",
        "badnets/reports/defend/ft/run.json",
        "badnets/data/triggered/attack.json",
        "badnets/models/backdoored.safetensors",
        "badnets/reports/train/training.png",
    ):
        write_text(tmp_path / name, "{}")
    campaign.collect(tmp_path, tmp_path / "out")
    with tarfile.open(tmp_path / "out/campaign.tar.gz") as tar:
        assert set(tar.getnames()) == {
            "badnets/params.yaml",
            "badnets/reports/benign/run.json",
            "badnets/reports/defend/ft/run.json",
            "badnets/data/triggered/attack.json",
            "shared/params.yaml",
            "shared/reports/benign/run.json",
        }
        assert all(member.isfile() for member in tar)
