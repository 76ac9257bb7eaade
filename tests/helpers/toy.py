"""Stages that take no time: `python toy.py train --lr 0.1 --out model --report reports/train`.

Their options have the values of their section in params.yaml, unless the command line has others.
"""

import os
import signal
import sys
import time
from pathlib import Path

import click

import stages.stage
from rnp.cli.options import PATH
from rnp.io.files import write_json
from rnp.io.history import History
from rnp.tracking import stage_run
from rnp.types import Epoch

PARAMS = {
    "seed": 0,
    "data": {"name": "shapes"},
    "poison": {"attack": "badnets"},
    "train": {"lr": 0.1, "epochs": 3, "rate": {"final": 0.5}},
    "recover": {"lr": 0.2},
}
PICTURE = b"\x89PNG\r\n\x1a\n"


def misbehave(how: str, report: Path) -> None:
    match how:
        case "raise":
            raise RuntimeError("no luck")
        case "exit":
            sys.exit(4)
        case "wait":
            (report / "waiting").touch()
            while (report / "waiting").exists():
                time.sleep(0.05)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "SIGTERM" | "SIGINT" | "SIGHUP":
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(60)


def stage(name: str) -> click.Command:
    @click.command(name)
    @click.option("--model", type=PATH)
    @click.option("--seed", default=0)
    @click.option("--lr", type=float, required=True)
    @click.option("--rate.final", "rate__final", type=float, default=0.5)
    @click.option("--do", default="well")
    @click.option("--epochs", default=3)
    @click.option("--out", type=PATH, required=True)
    @click.option("--report", type=PATH, required=True)
    def command(
        model: Path | None,
        seed: int,
        lr: float,
        rate__final: float,
        do: str,
        epochs: int,
        out: Path,
        report: Path,
    ) -> None:
        with History(report / "history.csv") as history:
            for epoch in range(epochs):
                history(
                    Epoch(
                        epoch=epoch,
                        step=10 * epoch,
                        loss=lr / (epoch + 1),
                        accuracy=0.5,
                        learning_rate=lr,
                        gradient_norm=1.0,
                        extra={"share of @1": 0.1},
                    )
                )
        misbehave(do, report)
        out.write_text(f"{name} {lr} {model and model.read_text()}")
        (report / "curve.png").write_bytes(PICTURE)
        write_json(
            report / "metrics.json",
            {"accuracy": lr, "gate": True, "note": "text", "inner": {"asr@5": 0.25}},
        )

    return command


if __name__ == "__main__":
    stages.stage.check_params = lambda params: params  # the toy has sections of its own
    stage_run.LIVE_AFTER = 0
    name = sys.argv.pop(1)
    stages.stage.main(stage(name), name)
