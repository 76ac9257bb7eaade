"""Does RNP work on networks of every kind? `python -m benchmarks.architectures TABLE` trains one
of each with a backdoor and repairs it.

Data, attack, unlearning, recovery and pruning are those of a preset, the same for all, and so is
the tuning of `rnp_ft` after it; width and training are of the table below. Each run is one row:
CA, ASR and RA before, after pruning and after the tuning, with the DER of both; the neurons, the
seconds of each step. Rows that the table has are not made again. `--summary` prints the rows as a
Markdown table instead, means over the seeds whose backdoor passed its gate.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from torch import nn

from rnp.attacks.base import backdoored_test_set
from rnp.cli.prepare import data_root
from rnp.data.base import Split
from rnp.defenses.rnp_ft import RNPFT
from rnp.errors import NonFiniteLossError, UserError
from rnp.evaluation.metrics import defense_effectiveness, score
from rnp.io.files import upsert_rows, read_rows
from rnp.models.build import Architecture, register_function
from rnp.params.fields import from_section
from rnp.params.presets import render
from rnp.params.read import Loader, flatten
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.registry import load
from rnp.reporting.provenance import provenance
from rnp.reporting.rows import MEASURES, format_row
from rnp.seeds import generator
from rnp.training.device import default_device
from rnp.training.malloc import keep_freed_pages
from rnp.training.recipe import Train
from rnp.unlearn import Unlearn

# Widths at which training takes a minute or two on two cores. Training as in the preset, but
# without the mirror, which would move
# the corner patch as a shift would: with it half of these networks learned no backdoor. And:
COMMON = {"augment.flip": False}


# Milliseconds a step on two cores (AMD EPYC) in fp32 and bf16: EfficientNet 83 and 191, MobileNetV2
# 127 and 162, ViT 74 and 116
FP32 = {"precision": "fp32"}
ADAMW = FP32 | {"optimizer": "adamw", "weight_decay": 0.05, "lr": 0.001}
EFFICIENTNET = "benchmarks.architectures:quarter_efficientnet"
SUBJECTS: dict[str, tuple[dict, dict]] = {
    "resnet18": ({"arch": "resnet18", "width": 12}, {}),
    "preactresnet18": ({"arch": "preactresnet18", "width": 12}, {}),
    "wrn16_1": ({"arch": "wrn16_1", "width": 16}, {}),
    "vgg19_bn": (
        {"arch": "vgg19_bn", "width": 12},
        {"epochs": 16},
    ),  # knows a seventh of the triggered images after 10
    "mobilenet_v2": ({"arch": "mobilenet_v2", "width": 8}, FP32),
    "efficientnet_b0": ({"arch": EFFICIENTNET}, FP32),
    "resnet18_gn": ({"arch": "resnet18_gn", "width": 12}, ADAMW),
    "vgg11": ({"arch": "vgg11", "width": 24}, ADAMW),
    "convnext": ({"arch": "convnext", "width": 24}, ADAMW | {"lr": 0.002}),
    "vit": ({"arch": "vit", "width": 48}, ADAMW | {"epochs": 20}),
}
ATTACKS = ("badnets", "blend")
STEPS = ("train", "unlearn", "recover", "prune", "rnp_ft")
COLUMNS = (
    "preset",
    "architecture",
    "attack",
    "seed",
    "arch",
    "width",
    "gate",
    *(f"{name}_before" for name in MEASURES),
    "unlearned_accuracy",
    *MEASURES,
    "der",
    *(f"{name}_guided" for name in (*MEASURES, "der")),
    "neurons_pruned",
    "neurons",
    *(f"seconds_{step}" for step in STEPS),
    "failed",
    "n_clean",
    "n_triggered",
    "device",
    "version",
    "torch",
    "made",
)
KEY = ("preset", "architecture", "attack", "seed")


def quarter_efficientnet(num_classes: int) -> nn.Module:
    """torchvision's EfficientNet-B0 at a quarter of its width; of the whole's 21,008 neurons 4,200
    would be tried one by one.
    """
    from torchvision.models import EfficientNet
    from torchvision.models.efficientnet import MBConvConfig

    # expansion, side of the kernel, stride, channels in and out, repeats: table 1 of Tan and Le,
    # ICML 2019
    stages = (
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4),
        (6, 3, 1, 192, 320, 1),
    )
    net = EfficientNet(
        [MBConvConfig(*stage, width_mult=0.25) for stage in stages],
        dropout=0.2,
        num_classes=num_classes,
    )
    net.features[0][0].stride = (1, 1)  # of 32 pixels a side its five halvings would leave one
    return net


class Clock:
    """Seconds since it was last read."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        self.start, passed = now, now - self.start
        return passed


def run(params: dict, name: str, attack: str, seed: int) -> dict[str, object]:
    """One architecture, trained with a backdoor and repaired. A step that RNP gives up is named
    under `failed`.
    """
    section = {
        key: dict(flatten(value)) for key, value in params.items() if isinstance(value, dict)
    }
    model_options, train_options = SUBJECTS[name]
    dataset = params["data"]["set"]
    source = from_section(load("dataset", dataset), section["datasets"], f"{dataset}.")
    train, test = source.load(data_root(), rng=generator(seed, "prepare"))
    splits = from_section(Split, section["data"])(train, test, rng=generator(seed, "split"))
    register_function(model_options["arch"])
    architecture, recipe = (
        from_section(Architecture, model_options),
        from_section(Train, section["train"] | COMMON | train_options),
    )
    method = from_section(load("attack", attack), section["attacks"], f"{attack}.")
    rng, clock = generator(seed, f"architectures/{name}"), Clock()
    model = architecture.build_for(splits.pool, rng=rng).to(default_device())
    changes = method.poison(splits.pool, rng=generator(seed, "poison"))
    model, trigger = method.train(
        model, changes.apply(splits.pool), changes.trigger, recipe, rng=rng
    )
    facts = {"seconds_train": clock()}
    attacked = backdoored_test_set(trigger, test, method.target)
    before = score(model, test, attacked, method.target, precision="auto")
    facts |= {f"{key}_before": before.flat()[key] for key in MEASURES} | {
        "arch": architecture.arch,
        "width": architecture.width,
        "gate": before.attack_success_rate.value >= method.min_asr,
        "n_clean": len(test),
        "n_triggered": len(attacked),
    }
    try:
        clock()
        unlearn = dataclasses.replace(
            from_section(Unlearn, section["unlearn"]), until_collapse=False
        )
        unlearned = unlearn(model, splits.defense.train, rng=generator(seed, "unlearn"))
        facts |= {"unlearned_accuracy": unlearned.accuracy, "seconds_unlearn": clock()}
        recovered = from_section(Recover, section["recover"])(
            unlearned.model, splits.defense.train, rng=generator(seed, "recover")
        )
        facts["seconds_recover"] = clock()
        pruned = from_section(Prune, section["prune"])(model, recovered.mask, splits.defense.all)
        facts |= {
            "seconds_prune": clock(),
            "neurons_pruned": pruned.chosen.pruned,
            "neurons": sum(map(len, recovered.mask.values())),
        }
        rnp_ft, rng = (
            from_section(RNPFT, section["defenses"], "rnp_ft."),
            generator(seed, "rnp_ft"),
        )
        triggers = rnp_ft.search.recover(model, splits.defense.train, rng=rng)
        tuned, _ = rnp_ft.fine_tune_against(
            copy.deepcopy(pruned.model),
            triggers,
            unlearned.trajectory,
            splits.defense.all,
            rng=rng,
        )
        facts["seconds_guided"] = clock()
    except (UserError, NonFiniteLossError) as error:
        return facts | {"failed": str(error)}
    for after, suffix in ((pruned.model, ""), (tuned, "_guided")):
        scores = score(after, test, attacked, method.target, precision="auto")
        facts |= {f"{key}{suffix}": scores.flat()[key] for key in MEASURES} | {
            f"der{suffix}": defense_effectiveness(before, scores)
        }
    return facts


def summary(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """A Markdown table: a line for each architecture and attack."""
    measured = [
        f"{name}{when}"
        for when in ("_before", "", "_guided")
        for name in ("clean_accuracy", "attack_success_rate")
    ]
    headings = (
        "architecture",
        "attack",
        "seeds",
        "gate",
        "CA before",
        "ASR before",
        "CA",
        "ASR",
        "CA, rnp_ft",
        "ASR, rnp_ft",
        "pruned of",
        *(f"s {step}" for step in STEPS),
    )
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for name, attack in dict.fromkeys((row["architecture"], row["attack"]) for row in rows):
        own = [row for row in rows if (row["architecture"], row["attack"]) == (name, attack)]
        passed = [row for row in own if row["gate"] == "true"]
        done = [row for row in passed if not row["failed"]]

        def mean(key):
            return sum(float(row[key]) for row in done) / len(done)

        cells = [name, attack, str(len(own)), f"{len(passed)} of {len(own)}"]
        if done:
            cells += [f"{mean(key):.3f}" for key in measured]
            cells += [
                f"{mean('neurons_pruned'):.0f} of {mean('neurons'):.0f}",
                *(f"{mean(f'seconds_{step}'):.0f}" for step in STEPS),
            ]
        else:
            cells += [passed[0]["failed"] if passed else ""]
            cells += [""] * (len(headings) - len(cells))
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="CSV file that takes the rows")
    parser.add_argument("--preset", default="demo")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SUBJECTS,
        default=list(SUBJECTS),
        metavar="NAME",
        help=", ".join(SUBJECTS),
    )
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=["badnets"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--summary", action="store_true", help="print the table of finished runs")
    arguments = parser.parse_args()
    rows = read_rows(arguments.table) if arguments.table.exists() else []
    if arguments.summary:
        print("\n".join(summary(rows)))
        return
    keep_freed_pages()
    params = yaml.load(render(arguments.preset), Loader)
    done = {tuple(row[key] for key in KEY) for row in rows}
    for seed in arguments.seeds:
        for attack in arguments.attacks:
            for name in arguments.only:
                key = (arguments.preset, name, attack, str(seed))
                if key in done:
                    continue
                row = format_row(
                    dict(zip(KEY, key))
                    | run(params, name, attack, seed)
                    | provenance()
                    | {"made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}"},
                    COLUMNS,
                )
                upsert_rows(arguments.table, [row], COLUMNS, KEY)
                print(
                    *(f"{column} {row[column]}" for column in COLUMNS if row[column] != ""),
                    sep=", ",
                    flush=True,
                )


if __name__ == "__main__":
    main()
