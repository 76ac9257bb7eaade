"""What every stage does round its command: check the parameters first, keep track meanwhile, write
run.json last.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from rnp.cli.main import guard
from rnp.errors import UserError
from rnp.io.files import write_json
from rnp.io.history import History
from rnp.params.read import read_params
from rnp.params.schema import check_params
from rnp.reporting.provenance import provenance
from rnp.tracking.stage_run import stage_run
from rnp.training.distributed import is_main_process
from rnp.training.malloc import keep_freed_pages

PARAMS = Path("params.yaml")


def main(command: click.Command) -> None:
    """Run `command` on the arguments of this process; MLflow sees its options, history, end values
    and figures.
    """
    keep_freed_pages()
    try:
        with guard():
            relaunch_with_torchrun(command)
            run_stage(parse(command, sys.argv[1:]))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)


def relaunch_with_torchrun(command: click.Command) -> None:
    """Become torchrun with RNP_PROCESSES of us, where that asks for several and the command can
    share its work.

    Raises: UserError when it is no number of processes.
    """
    count = os.environ.get("RNP_PROCESSES", "1")
    if not getattr(command, "parallel", False) or "RANK" in os.environ or count == "1":
        return
    if not count.isdecimal() or count == "0":
        raise UserError(f"RNP_PROCESSES must be a whole number above 0, got {count!r}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(count))))
    os.execv(
        sys.executable,
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={count}",
            "-m",
            f"stages.{command.name}",
            *sys.argv[1:],
        ],
    )


def parse(command: click.Command, arguments: list[str]) -> click.Context:
    """The context of `command`, or of the sub-command that the arguments begin with."""
    context = command.make_context(command.name, list(arguments))
    if not isinstance(command, click.Group):
        return context
    name, command, rest = command.resolve_command(context, list(arguments))
    return command.make_context(name, rest, parent=context)


def run_stage(context: click.Context) -> None:
    params = read_params(PARAMS)
    check_params(params)
    stage = os.environ.get("DVC_STAGE", context.command_path).replace("@", "/").replace(" ", "/")
    if not is_main_process():
        with context:
            context.command.invoke(context)
        return
    report = context.params["report"]
    options = {
        name.replace("__", "."): value
        for name, value in context.params.items()
        if not isinstance(value, Path)
    }
    with stage_run(stage, options, params["poison"]["attack"]) as tracked:
        start = time.perf_counter()
        History.listeners.append(tracked.row)
        with context:
            context.command.invoke(context)
        seconds = round(time.perf_counter() - start, 2)
        tracked.results(report, seconds)
        write_json(
            report / "run.json",
            {"stage": stage, "run_id": tracked.id, "params": options, "seconds": seconds}
            | provenance(),
        )
