"""Run a click command as a DVC stage: its sections of params.yaml are the defaults of its options.

The whole of params.yaml is checked first, MLflow keeps track meanwhile, and run.json is written
last.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

from rnp.cli.main import guard
from rnp.errors import UserError
from rnp.io.files import write_json
from rnp.io.history import History
from rnp.params.fields import argument
from rnp.params.read import flatten, params_in_use, read_params
from rnp.params.schema import check_params
from rnp.reporting.provenance import provenance
from rnp.tracking.stage_run import stage_run
from rnp.training.distributed import is_main_process
from rnp.training.malloc import keep_freed_pages

PARAMS = Path("params.yaml")


@dataclass(frozen=True)
class Sections:
    """Where in params.yaml the options of a command are.

    The keys of the sections in `plain` are options as they are, those in `prefixed` behind the name
    of the section and a dot. `family` is a section with a part for each sub-command.
    """

    plain: tuple[str, ...] = ()
    prefixed: tuple[str, ...] = ()
    family: str = ""

    def options(self, params: dict, member: str) -> dict[str, str]:
        """The option for each key of params.yaml, which has its sections before it."""
        options = {"seed": "seed", "precision": "precision"}
        for section in self.plain:
            options |= {f"{section}.{key}": key for key, _ in flatten(params[section])}
        for section in self.prefixed:
            keys = [f"{section}.{key}" for key, _ in flatten(params[section])]
            options |= dict(zip(keys, keys))
        if self.family:
            part = params[self.family].get(member, {})
            options |= {f"{self.family}.{member}.{key}": key for key, _ in flatten(part)}
        return options


def main(
    command: click.Command, *plain: str, prefixed: tuple[str, ...] = (), family: str = ""
) -> None:
    """Run `command` on the arguments of this process, with its sections of params.yaml.

    MLflow sees its parameters, history, final values and figures.
    """
    keep_freed_pages()
    try:
        with guard():
            relaunch_with_torchrun(command)
            run_stage(command, Sections(plain, prefixed, family), sys.argv[1:])
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)


def relaunch_with_torchrun(command: click.Command) -> None:
    """Re-execute under torchrun when RNP_PROCESSES is above 1 and the stage supports it.

    Raises: UserError when RNP_PROCESSES is no number of processes.
    """
    count = os.environ.get("RNP_PROCESSES", "1")
    if not getattr(command, "parallel", False) or "RANK" in os.environ or count == "1":
        return
    if not count.isdecimal() or count == "0":
        raise UserError(f"RNP_PROCESSES must be a whole number above 0, got {count!r}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(count))))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    stage = [f"--nproc-per-node={count}", "-m", f"stages.{command.name}"]
    os.execv(sys.executable, [*torchrun, *stage, *sys.argv[1:]])


def run_stage(command: click.Command, sections: Sections, arguments: list[str]) -> None:
    """Run the command, and write REPORT/run.json when it has ended well."""
    params = check_params(read_params(PARAMS))
    member = arguments[0] if sections.family and arguments else ""
    options = sections.options(params, member)
    context = parse(command, arguments, defaults(params, options))
    if not is_main_process():
        invoke(context)
        return
    stage = os.environ.get("DVC_STAGE", str(command.name)).replace("@", "/")
    report = context.params["report"]
    recorded = parameters_of(context, options, params, member)
    with stage_run(stage, recorded, params["poison"]["attack"]) as tracked:
        start = time.perf_counter()
        History.listeners.append(tracked.row)
        work = invoke_and_count(context)
        costs = {"seconds": round(time.perf_counter() - start, 2)} | work
        tracked.results(report, costs)
        run = {"stage": stage, "run_id": tracked.id, "params": recorded}
        write_json(report / "run.json", run | costs | provenance())


def defaults(params: dict, options: dict[str, str]) -> dict[str, object]:
    """The values in params.yaml as click takes them, by the names of the options."""
    values = dict(flatten(params))
    return {argument(option): values[key] for key, option in options.items() if key in values}


def parse(
    command: click.Command, arguments: list[str], defaults: dict[str, object]
) -> click.Context:
    """The context of `command`, or of the sub-command with whose name the arguments begin."""
    if not isinstance(command, click.Group):
        return command.make_context(command.name, list(arguments), default_map=defaults)
    context = command.make_context(command.name, list(arguments))
    name, subcommand, rest = command.resolve_command(context, list(arguments))
    if subcommand is None:
        raise UserError(f"{command.name} needs the name of a sub-command")
    return subcommand.make_context(name, rest, parent=context, default_map=defaults)


def invoke(context: click.Context) -> None:
    """Run the command of a context."""
    with context:
        context.command.invoke(context)


def invoke_and_count(context: click.Context) -> dict[str, int]:
    """Run the command, and count the multiply-adds where it has the defender's images.

    Counting costs a few percent of the time, so it is left out elsewhere.
    """
    if "defense" not in context.params:
        invoke(context)
        return {}
    from rnp.training.work import WorkCounter  # loads PyTorch

    with WorkCounter() as counter:
        invoke(context)
    return {
        "multiply_adds_forward": counter.forward,
        "multiply_adds_backward": counter.backward,
    }


def parameters_of(
    context: click.Context, options: dict[str, str], params: dict, member: str
) -> dict[str, object]:
    """What the command runs with, by the keys of params.yaml, without options that are not used."""
    used = {key for key, _ in flatten(params_in_use(params))}
    values = context.params
    recorded = {
        key: values[argument(option)]
        for key, option in options.items()
        if argument(option) in values
        and (key in used or key.partition(".")[2].startswith(f"{member}."))
    }
    return recorded
