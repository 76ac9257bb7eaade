"""Two processes train what one trains: weights, statistics, history and the logits of each batch.

The batches need not be divisible by the number of processes.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner

from rnp.cli.main import cli
from rnp.errors import UserError
from rnp.training import distributed

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch
from torch import nn
from rnp.training.augment import Augment
from rnp.training.device import use_precision
from rnp.training.distributed import is_main_process
from rnp.training.recipe import Train
from rnp.types import ImageSet

torch.set_num_threads(1)
rng = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (22, 3, 8, 8), generator=rng, dtype=torch.uint8)
data = ImageSet(images, torch.arange(22) % 4, tuple("abcd"))
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
    nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
    nn.Flatten(2), nn.BatchNorm1d(8, affine=False), nn.Flatten(), nn.Linear(128, 4),
)
rows = []
summed_logits = torch.zeros(22, 4)

def on_batch(positions, labels, logits):
    assert labels.equal(data.labels[positions])
    summed_logits[positions] += logits

# Batches of 7, 7, 7 and 1.
train = Train(epochs=3, batch_size=7, lr=0.05, augment=Augment(crop=2, flip=True))
with use_precision("fp32"):
    train(model, data, rng=rng, on_epoch=rows.append, on_batch=on_batch)
assert [type(model[i]) for i in (1, 4, 7)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]
results = {name: value.double() for name, value in model.state_dict().items()}
results["logits"] = summed_logits.double()
results["history"] = torch.tensor([[row.loss, row.accuracy, row.step] for row in rows]).double()
torch.save(results, f"{sys.argv[1]}.{is_main_process()}")
"""


def train(folder, *launcher):
    (folder / "script.py").write_text(SCRIPT)
    name = folder / ("two" if launcher else "one")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RNP_DEVICE": "cpu"}
    process = subprocess.run(
        [sys.executable, *launcher, str(folder / "script.py"), str(name)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return [torch.load(f"{name}.{main}") for main in ((True, False) if launcher else (True,))]


def test_two_processes_are_one(tmp_path):
    (one,) = train(tmp_path)
    first, second = train(
        tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    )
    for name, value in one.items():
        assert torch.allclose(value, first[name], rtol=1e-4, atol=1e-5), name
        assert torch.allclose(first[name], second[name], rtol=1e-6, atol=1e-6), name


def test_other_commands_refuse_several_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    paths = [word for option in ("model", "defense") for word in (f"--{option}", str(tmp_path))]
    result = CliRunner().invoke(cli, ["unlearn", *paths, "--out", "x", "--report", "y"])
    assert isinstance(result.exception, UserError) and "without torchrun" in str(result.exception)


def test_there_is_one_process_without_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.world_size() == 1 and distributed.is_main_process()
    monkeypatch.setenv("RANK", "3")
    assert distributed.world_size() == 4 and not distributed.is_main_process()
