"""What MLflow sees of a stage, and that nothing it does or fails to do reaches the stage."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from rnp import tracking
from rnp.io import History, load_model, save_model
from rnp.models.build import Architecture

ROOT = Path(__file__).parents[2]


def metrics(store, run_id, name):
    return [(m.step, m.value) for m in store.client.get_metric_history(run_id, name)]


def test_stage(project):
    assert project.stage("train", lr=0.5) == 0
    (run,) = project.runs()
    store = project.store()
    assert run.info.status == "FINISHED" and run.info.run_name == "train-badnets"
    assert run.data.params == {"lr": "0.5", "do": "well", "epochs": "3", "rate.final": "0.5", "model": "None"}
    assert metrics(store, run.info.run_id, "loss") == [(0, 0.5), (10, 0.25), (20, pytest.approx(0.5 / 3))]
    assert metrics(store, run.info.run_id, "share of _1") == [(0, 0.1), (10, 0.1), (20, 0.1)]
    ends = {name: value for name, value in run.data.metrics.items() if name.startswith("final/")}
    assert ends == {"final/accuracy": 0.5, "final/gate": 1, "final/inner/asr_5": 0.25}
    assert [f.path for f in store.client.list_artifacts(run.info.run_id, "plots")] == ["plots/curve.png"]
    assert project.run_json("train") == {
        "stage": "train", "run_id": run.info.run_id, "seconds": run.data.metrics["seconds"],
        "params": {"lr": 0.5, "do": "well", "epochs": 3, "rate.final": 0.5, "model": None},
    }
