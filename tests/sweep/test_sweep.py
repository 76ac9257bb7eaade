"""A grid on a project of two trivial stages: every point ends as `dvc repro` would end it, whatever
process is killed meanwhile.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from rnp.cli.main import cli
from rnp.errors import UserError
from rnp.sweep import runners
from rnp.sweep.grid import grid, label
from rnp.sweep.run import check_rows_differ
from rnp.sweep.workspace import Configuration, Snapshot, sources

ROOT = Path(__file__).parents[2]
WORK = """
import os, pathlib, sys, time
stage, value, *reads = sys.argv[1:]
came = "".join(pathlib.Path(name).read_text() for name in reads)
log = pathlib.Path(os.environ["TOY"])
(log / "environment").write_text("\\n".join(f"{name}={text}" for name, text in os.environ.items()))
def say(what):
    with (log / "log").open("a") as file:
        file.write(f"{what} {came}{stage}{value}\\n")
say("begin")
if (log / f"hang {came}{stage}{value}").exists():
    (log / f"hang {came}{stage}{value}").rename(log / "hanging")
    time.sleep(600)
if value == "3":
    sys.exit("error: 3 is bad luck")
pathlib.Path(f"{stage}.txt").write_text(f"{came}{stage}{value} ")
say("end")
"""
DVC = """
stages:
  a:
    cmd: python work.py a ${a.value}
    deps: [work.py]
    outs: [a.txt]
  b:
    cmd: python work.py b ${b.value} a.txt
    deps: [work.py, a.txt]
    metrics: [b.txt: {cache: false}]
"""
GRID = ["-S", "a.value=1,2", "-S", "b.value=1,2"]
NAMES = [f"a.value={a},b.value={b}" for a in (1, 2) for b in (1, 2)]


class Toy:
    """A checkout without git, the log of its stages, and ways to sweep it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.facts = folder / "a checkout", folder / "facts"
        self.facts.mkdir()
        self.root.mkdir()
        (self.root / "work.py").write_text(WORK)
        (self.root / "dvc.yaml").write_text(DVC)
        (self.root / "params.yaml").write_text("# what it takes\na: {value: 0}\nb: {value: 0}\n")
        (self.root / ".gitignore").write_text("/a.txt\n/b.txt\n")
        self.env = {
            **os.environ,
            "TOY": str(self.facts),
            "PYTHONPATH": str(ROOT),
            "DVC_NO_ANALYTICS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        self.dvc("init", "--no-scm", "-q")

    def dvc(self, *arguments: str, cwd: Path | None = None) -> None:
        subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=cwd or self.root,
            env=self.env,
            check=True,
            capture_output=True,
        )

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "rnp", "sweep", *arguments],
            cwd=self.root,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def sweep(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=100)
        assert process.returncode == code, out + err
        return out + err

    def hang(self, what: str) -> None:
        """The first time that this stage runs with these inputs, it never ends."""
        (self.facts / f"hang {what}").touch()

    def wait_for_hanging(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.facts / "hanging").exists():
            assert time.monotonic() < deadline, "the stage never ran"
            time.sleep(0.05)

    def log(self) -> Counter:
        return Counter((self.facts / "log").read_text().splitlines())

    def results(self, folder: Path) -> list[str]:
        return [(folder / name).read_text() for name in ("params.yaml", "a.txt", "b.txt")]

    def at_work(self) -> list[psutil.Process]:
        return [each for each in psutil.process_iter() if runners.belongs_to(each, self.root)]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    checkout = Toy(tmp_path)
    monkeypatch.chdir(checkout.root)
    yield checkout
    runners.terminate_tree(checkout.root)


ONCE = {
    f"{what} {each}": 1
    for what in ("begin", "end")
    for each in ("a1", "a2", "a1 b1", "a1 b2", "a2 b1", "a2 b2")
}


@pytest.mark.parametrize("victim", ["dvc", "stage"])
def test_a_worker_is_killed(victim, toy):
    """Its stage runs again, all others run once, and each point ends as in a new folder."""
    toy.hang("a1 b2")
    process = toy.start(*GRID, "--workers", "2")
    toy.wait_for_hanging()
    inside = {"dvc": "repro_once.py", "stage": "work.py"}[victim]
    doomed = next(
        each
        for each in toy.at_work()
        if any(word.endswith(inside) for word in each.cmdline()) and each.cwd().endswith(NAMES[1])
    )
    doomed.kill()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, out + err
    assert [line.split()[:2] for line in out.splitlines()[-4:]] == [
        [name, "finished"] for name in NAMES
    ]
    assert toy.log() == ONCE | {"begin a1 b2": 2} and toy.at_work() == []

    alone = toy.root.parent / "alone"
    alone.mkdir()
    for name in ("work.py", "dvc.yaml"):
        (alone / name).write_text((toy.root / name).read_text())
    (alone / "params.yaml").write_text("# what it takes\na: {value: 1}\nb: {value: 2}\n")
    toy.dvc("init", "--no-scm", "-q", cwd=alone)
    toy.dvc("repro", cwd=alone)
    assert toy.results(alone)[1:] == toy.results(toy.root / "sweeps" / NAMES[1])[1:]


def test_the_sweep_is_killed_and_goes_on(toy):
    toy.hang("a2 b1")
    first = toy.start(*GRID, "--workers", "1")
    toy.wait_for_hanging()
    refused = toy.sweep(*GRID, code=2)
    assert (
        refused.startswith("error: another `rnp sweep` is at work in") and refused.count("\n") == 1
    )

    first.kill()
    first.communicate()
    assert toy.at_work(), "its children live on"
    out = toy.sweep(*GRID)
    assert (
        out.count("finished before") == 4 and toy.at_work() == []
    )  # two points, reported when it ends and in the table
    assert toy.log() == ONCE | {"begin a2 b1": 2}

    assert toy.sweep(*GRID).count("finished before") == 8 and toy.log() == ONCE | {"begin a2 b1": 2}
    assert "1 of 2 configurations to run" in toy.sweep("-S", "a.value=1", "-S", "b.value=2,4")
    (toy.root / "work.py").write_text(f"{WORK}# more\n")
    assert "4 of 4 configurations to run" in toy.sweep(*GRID), "other code, another result"


def test_stages_find_what_the_checkout_has(toy):
    toy.env |= {"RNP_DATA": "../images", "MLFLOW_TRACKING_URI": "sqlite:///runs/mlflow.db"}
    toy.sweep("-S", "a.value=1", "--target", "a", "--threads", "3", "--out", "../elsewhere")
    env = dict(
        line.split("=", 1)
        for line in (toy.facts / "environment").read_text().splitlines()
        if "=" in line
    )
    assert (
        env["RNP_DATA"] == f"{toy.root}/../images"
        and env["MLFLOW_TRACKING_URI"] == f"sqlite:///{toy.root}/runs/mlflow.db"
    )
    assert (env["DVC_ROOT"], env["DVC_EXP_NAME"], env["OMP_NUM_THREADS"]) == (
        str(toy.root),
        "a.value=1",
        "3",
    )
    assert (toy.root.parent / "elsewhere/a.value=1/a.txt").read_text() == "a1 "


def test_an_interrupted_sweep_leaves_nothing_at_work(toy):
    toy.hang("a1 b1")
    process = toy.start(*GRID, "--workers", "1")
    toy.wait_for_hanging()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and toy.at_work() == []


def test_what_fails_is_tried_again_and_reported(toy):
    out = toy.sweep("-S", "a.value=3,1", "-S", "b.value=1", "--target", "a", code=1)
    failed, finished = out.splitlines()[-2:]
    assert (
        failed.split()[:2] == ["a.value=3,b.value=1", "failed"]
        and "a: 3 is bad luck (a.value=3,b.value=1.log)" in failed
    )
    assert finished.split()[:2] == ["a.value=1,b.value=1", "finished"]
    assert toy.log() == {"begin a3": 2, "begin a1": 1, "end a1": 1}


def test_a_copy_follows_the_checkout(toy):
    """Deleted files are deleted in the copy too; outputs of stages stay."""
    one = Configuration(
        name="one", folder=toy.root.parent / "one", params="a: {value: 1}\n", key="k"
    )
    (toy.root / "sub").mkdir()
    (toy.root / "sub/old.py").write_text("")
    one.copy(Snapshot.take(toy.root, without=toy.root / "dvc.yaml"))
    assert (one.folder / "sub/old.py").exists() and not (one.folder / "dvc.yaml").exists()
    one.finish(3.0)
    assert one.finished
    (one.folder / "a.txt").write_text("made")
    (toy.root / "sub/old.py").unlink()
    one.copy(Snapshot.take(toy.root, without=None))
    assert (
        not one.finished
        and not (one.folder / "sub/old.py").exists()
        and (one.folder / "a.txt").read_text() == "made"
    )
    config = (one.folder / ".dvc/config.local").read_text()
    assert f"dir = {toy.root}/.dvc/cache" in config and "no_scm = True" in config


def test_what_is_copied(toy):
    (toy.root / "a.txt").write_text("")
    (toy.root / "dvc.lock").write_text("")
    (toy.root / "sweeps").mkdir()
    (toy.root / "sweeps/.gitignore").write_text("*\n")
    assert sources(toy.root) == [".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml", "work.py"]
    for command in (["init", "-q"], ["add", "work.py", "dvc.yaml", "params.yaml"]):
        subprocess.run(["git", *command], check=True, cwd=toy.root)
    (toy.root / "dvc.yaml").unlink()
    assert sources(toy.root) == ["work.py"]


def test_the_key_takes_in_parameters_code_and_target(toy):
    before = Snapshot.take(toy.root, without=None)
    (toy.root / "work.py").write_text("pass\n")
    after = Snapshot.take(toy.root, without=None)
    keys = {
        before.key("a: 1", ""),
        before.key("a: 2", ""),
        before.key("a: 1", "a"),
        after.key("a: 1", ""),
    }
    assert len(keys) == 4 and before.key("a: 1", "") == before.key("a: 1", "")


def test_points_are_those_of_dvc(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("seed: 0  # of all\ntrain: {lr: 0.1, words: [x]}\n")
    texts = grid(["seed=range(0,4,2)", "train.lr=1e-5,.5", "+train.new=yes"], params)
    assert list(texts) == [
        f"seed={seed},train.lr={lr},+train.new=yes" for seed in (0, 2) for lr in ("1e-05", 0.5)
    ]
    assert (
        texts["seed=2,train.lr=0.5,+train.new=yes"]
        == "seed: 2  # of all\ntrain: {lr: 0.5, words: [x], new: yes}\n"
    )


@pytest.mark.parametrize(
    "override, says",
    [
        ("train.lrr=1", "lrr"),
        ("seed", "seed"),
        ("other.yaml:seed=1", "not other.yaml"),
        ("seed=2,range(4,5)", ""),
    ],
)
def test_what_dvc_refuses_is_refused(override, says, tmp_path):
    (tmp_path / "params.yaml").write_text("seed: 0\ntrain: {lr: 0.1}\n")
    with pytest.raises(UserError, match=f"-S.*{says}"):
        grid([override], tmp_path / "params.yaml")


def test_names_are_names_of_folders():
    assert label(["a.b=1", "+c=x"]) == "a.b=1,+c=x"
    assert label(["a=[x/y]"]) != label(["a=[x:y]"]) and "/" not in label(["a=[x/y]"])
    assert len(label(["a=" + "x" * 300])) < 150 and label(["a=" + "x" * 300]) != label(
        ["a=" + "x" * 301]
    )
    assert not label(["../a=1"]).startswith(".")


def test_rows_that_a_table_would_confuse(tmp_path):
    configurations = []
    for seed, lr in ((0, 1), (1, 1), (1, 2)):
        configurations.append(
            Configuration(name=f"{seed}-{lr}", folder=tmp_path / f"{seed}-{lr}", params="", key="")
        )
        configurations[-1].folder.mkdir()
        (configurations[-1].folder / "params.yaml").write_text(
            f"seed: {seed}\npoison: {{attack: sig}}\nlr: {lr}\n"
        )
    check_rows_differ(configurations[:2])
    with pytest.raises(UserError, match="which 1-1 and 1-2 share"):
        check_rows_differ(configurations)


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is an extra")
def test_ray_loses_a_worker(toy):
    """It starts the task again, which ends the processes of the lost worker."""
    toy.hang("a1 b2")
    process = toy.start(*GRID, "--ray", "--threads", "1")
    toy.wait_for_hanging()
    (dvc,) = (
        each
        for each in toy.at_work()
        if each.cwd().endswith(NAMES[1]) and "repro_once.py" in " ".join(each.cmdline())
    )
    assert "ray" in dvc.parent().name()
    dvc.parent().kill()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, out + err
    assert toy.log() == ONCE | {"begin a1 b2": 2} and toy.at_work() == []


def test_without_ray_it_says_so(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    result = CliRunner().invoke(cli, ["sweep", *GRID, "--ray"])
    assert isinstance(result.exception, UserError) and "pip install" in str(result.exception)
