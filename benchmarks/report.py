"""Tables of the benchmark, from its raw numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from benchmarks.subprocesses import Runs, median
from rnp.training.openmp import SPINS

FOUR = {
    "removal: RNP, with the ascent to the collapse": "rnp",
    "trigger: neural_cleanse": "triggers/neural_cleanse",
    "label: class_shares, from the same ascent": "labels/class_shares",
    "samples: confidence": "samples/confidence",
}
"""One method for each of the four tasks, by its run in the part `detectors`."""
MIB = 2**20
NO = "–"


def headline(parts: dict[str, dict]) -> dict[str, dict]:
    """`ratio` by device, and `seconds` (those of the CPU where both were measured); what was not
    measured is not there.
    """
    ratio: dict[str, dict[str, float]] = {"rnp_vs_published": {}, "train_vs_fp32": {}}
    seconds: dict[str, float] = {}
    for name, part in sorted(parts.items(), key=lambda item: item[1]["device"] == "cpu"):
        base, runs = name.removesuffix(f"_{part['device']}"), part.get("runs", {})
        if base == "train":
            rates = (median(runs, which, "images_per_second") for which in ("ours", "plain"))
            put(ratio["train_vs_fp32"], part["device"], quotient(*rates))
        elif base == "rnp":
            seconds_of = (median(runs, which, "seconds") for which in ("published", "ours"))
            put(ratio["rnp_vs_published"], part["device"], quotient(*seconds_of))
        elif base == "start":
            put(seconds, "stage_start", median(runs, "stage, tracking on", "seconds"))
        elif base == "demo":
            put(seconds, "demo_pipeline", median(runs, "pipeline", "seconds"))
        elif base == "noop":
            put(seconds, "noop_repro", median(runs, "repro", "seconds"))
    return {"ratio": ratio, "seconds": seconds}


def put(numbers: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        numbers[name] = value


def quotient(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def markdown(record: dict, *, picture: str) -> str:
    """The page; `picture` is the path of the plot of `scaling`, from where the page lies."""
    parts = record["parts"]
    lines = [
        "# Benchmarks",
        "",
        (
            "Made by `make bench`, or `rnp bench`; the raw numbers with all repeats are in the JSON"
            " file beside this page. Numbers are medians over repeats, of which there is one where"
            " a measurement takes over a minute. Each measurement is a process of its own. Under"
            " each title stands the machine that gave the numbers; where its load average was not"
            " near 0, other work took part of it and the seconds are too many. The JSON file keeps"
            " processor seconds too."
        ),
        "",
    ]
    lines += table(
        ["", "ours is faster by a factor of", "device"],
        [
            [title, number(value), device]
            for key, title in (
                ("rnp_vs_published", "RNP against the published procedure"),
                ("train_vs_fp32", "training against a plain fp32 loop"),
            )
            for device, value in record["ratio"][key].items()
        ],
    )
    lines += table(
        ["", "seconds"],
        [
            [title, number(record["seconds"][key])]
            for key, title in (
                ("stage_start", "start of a stage"),
                ("noop_repro", "`dvc repro` with nothing to do"),
                ("demo_pipeline", "`dvc repro` of demo from nothing"),
            )
            if key in record["seconds"]
        ],
    )
    for name, part in parts.items():
        base = name.removesuffix(f"_{part['device']}")
        title, write = SECTIONS[base]
        on = "" if part["device"] == "cpu" else f" ({part['device']})"
        lines += [f"## {title}{on}", "", f"*{origin(part)}*", ""]
        if "failed" in part:
            lines += [f"**Failed**: {part['failed']}", ""]
            continue
        lines += write(part)
        broken = [
            (run, done["failed"]) for run, done in part["runs"].items() if isinstance(done, dict)
        ]
        lines += [f"**Failed**: {run}: {why}" for run, why in broken] + [""] * bool(broken)
        if base == "scaling":
            lines += [f"![seconds against size]({picture})", ""]
    return "\n".join(lines).rstrip() + "\n"


def origin(part: dict) -> str:
    versions = ", ".join(
        f"{name} {part['versions'][name]}"
        for name in ("torch", "Python", "python")
        if name in part["versions"]
    )
    commit = (
        f"commit {part['commit'][:8]}{'-dirty' * part['commit'].endswith('-dirty')}, "
        if part["commit"]
        else ""
    )
    arithmetic = "bf16 is native" if part["machine"]["bf16"] else "no native bf16, `auto` is fp32"
    load = "" if part["load"] is None else f"; load average {part['load']:.1f} before it began"
    return (
        f"{part['machine']['name']}; {part['machine']['memory_gib']:g} GiB; {arithmetic};"
        f" {versions}; {commit}{part['made']} UTC{load}"
    )


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    rows = list(rows)
    return (
        ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]
        if rows
        else []
    )


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never as a power of ten."""
    if value is None:
        return NO
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.4f}" if "e" in text else text


def mib(value: float | None) -> str:
    return NO if value is None else f"{value / MIB:,.0f}"


def repeats(runs: Runs, name: str) -> str:
    return "failed" if isinstance(runs.get(name), dict) else str(len(runs.get(name, [])))


def rows(
    runs: Runs, columns: dict[str, Callable[[float | None], str]], names: Iterable[str]
) -> Iterator[list[str]]:
    """Name, the median of each column, repeats."""
    for name in names:
        yield [
            name,
            *(write(median(runs, name, key)) for key, write in columns.items()),
            repeats(runs, name),
        ]


def memory(part: dict) -> dict[str, str]:
    return {"peak": "peak memory, MiB"} | (
        {"peak_gpu": "on the GPU, MiB"} if part["device"] != "cpu" else {}
    )


def costs(part: dict, first: str, names: Iterable[str]) -> list[str]:
    """A table of seconds and memory."""
    extra = memory(part)
    return table(
        [first, "seconds", *extra.values(), "repeats"],
        rows(part["runs"], {"seconds": number, **dict.fromkeys(extra, mib)}, names),
    )


def train(part: dict) -> list[str]:
    titles, runs = (
        {"plain": "plain loop, fp32", "ours": "`rnp`, precision auto", "ours, fp32": "`rnp`, fp32"},
        part["runs"],
    )
    ours = runs["ours"][0] if isinstance(runs.get("ours"), list) else {}
    columns = {"steps": number, "images_per_second": number} | dict.fromkeys(memory(part), mib)
    lines = [
        (
            f"ResNet-18 of width {ours.get('width', NO)}, batches of {ours.get('batch', NO)} images"
            " of 32 by 32 pixels. The plain loop takes PIL images through torchvision's transforms"
            " (crop, flip, normalize), with loader workers, contiguous tensors and `loss.item()`"
            " at each step; ours is `Train`, which augments whole batches."
        ),
        "",
        *table(
            ["", "steps", "images a second", *memory(part).values(), "repeats"],
            [[titles[name], *cells] for name, *cells in rows(runs, columns, titles)],
        ),
    ]
    if "flops" in ours:
        lines += [
            (
                "On a GPU steps are recorded, which takes time at the start of a run: after its"
                f" first epoch {number(ours['steady_images_per_second'])} images a second,"
                f" {ours['flops'] / 1e12:.0f} TFLOP/s of convolutions and linear layers,"
                f" {ours['flops'] / ours['peak_flops']:.0%} of the {ours['peak_flops'] / 1e12:.0f}"
                " that a bf16 product of matrices of 8,192 by 8,192 reaches on this card."
            ),
            "",
        ]
    return lines


def waiting(part: dict) -> list[str]:
    titles = {
        f"{way}, {where}": f"{title}, {where}"
        for where in ("alone", "beside a busy process")
        for way, title in (("ours", "as `rnp` has it"), ("untouched", "as libgomp has it"))
    }
    return [
        (
            "A step of a small network (ResNet-10 of width 16, 32 images of 32 by 32 pixels,"
            " fp32), whose threads wait for one another in every layer: `rnp` lets them spin for"
            f" {SPINS:,} turns and then sleep, libgomp by itself for longer. The busy process takes"
            " all of one core."
        ),
        "",
        *table(
            ["", "ms a step", "steps", "repeats"],
            [
                [titles[name], *cells]
                for name, *cells in rows(
                    part["runs"], {"milliseconds": number, "steps": number}, titles
                )
            ],
        ),
    ]


def rnp(part: dict) -> list[str]:
    runs = part["runs"]
    ours, theirs = (
        runs[name][0] if isinstance(runs.get(name), list) else None
        for name in ("ours", "published")
    )
    some = ours or theirs or {}
    lines = [
        (
            f"The backdoored model of a run of `{part['subject']}`, {some.get('n_clean', 0):,} test"
            f" images and {some.get('n_triggered', 0):,} triggered ones; the same weights and"
            " images for both. *Ours* unlearns, recovers and prunes with the settings of the run"
            " and is then evaluated once; in the first row its ascent ends at the stop, as the"
            " published one does, in the second it goes on to the collapse, as the pipeline does"
            " for the detectors. *Published* is a plain restatement (fp32, contiguous tensors, a"
            " DataLoader, learning rate .01): it takes as many optimizer steps, in whole epochs,"
            " and evaluates the model on all test images after every epoch and at each of 19"
            " thresholds. Its masks are learned from where its own rule stops; the CA and ASR"
            " given are those of the threshold with the lowest ASR among those that cost at most"
            " two points of CA, which is chosen on the test images and so flatters it: ours"
            " chooses on the defense set. Image passes count forward passes only, those of a part"
            " of the network by its share of the work."
        ),
        "",
    ]
    columns = {
        "seconds": ("seconds", number),
        "evaluation_seconds": ("of it evaluations, s", number),
        "peak": ("peak, MiB", mib),
        "unlearn_steps": ("unlearning steps", number),
        "recover_steps": ("recovery steps", number),
        "evaluations": ("evaluations", number),
        "image_passes": ("image passes", number),
        "clean_accuracy_before": ("CA before", share),
        "attack_success_rate_before": ("ASR before", share),
        "clean_accuracy": ("CA", share),
        "attack_success_rate": ("ASR", share),
    }
    lines += table(
        ["", *(title for title, _ in columns.values()), "repeats"],
        rows(
            runs,
            {key: write for key, (_, write) in columns.items()},
            ("ours", "ours, to collapse", "published"),
        ),
    )
    if theirs and theirs["recover_epochs"] != 20:
        lines += [
            (
                f"With these images {theirs['recover_steps']} steps of recovery are"
                f" {theirs['recover_epochs']} epochs, each with its evaluation; the published run"
                " has 500 images and 20 epochs."
            ),
            "",
        ]
    if theirs and theirs["extrapolated"]:
        lines += [
            (
                "The seconds of *published* are **extrapolated** from one epoch of each kind and"
                " one evaluation; no model was made."
            ),
            "",
        ]
    elif theirs:
        lines += [
            (
                f"The published rule {'stops' if theirs['stopped'] else 'had not stopped'} after"
                f" {theirs['own_unlearn_steps']} steps of unlearning; counted to there the"
                f" published run takes {number(theirs['own_seconds'])} s."
            ),
            "",
        ]
    if ours:
        phases = (
            f"{name} {number(value)} s ({precision})"
            for (name, value), precision in zip(ours["phases"].items(), ours["precision"])
        )
        lines += [f"Ours, by phase and its `precision`: {', '.join(phases)}.", ""]
    return lines


def share(value: float | None) -> str:
    return NO if value is None else f"{value:.3f}"


def defenses(part: dict) -> list[str]:
    return [
        (
            f"Each on the same backdoored model of a run of `{part['subject']}`, with the settings"
            " of that run or, where it has none, its defaults; without loading and without a test"
            " image."
        ),
        "",
        *costs(part, "defense", part["runs"]),
    ]


def detectors(part: dict) -> list[str]:
    runs = part["runs"]
    found = {title: median(runs, name, "seconds") for title, name in FOUR.items()}
    total = None if None in found.values() else sum(found.values())
    return [
        (
            f"Each on the backdoored model of a run of `{part['subject']}`; samples are sought"
            " among 500 clean and 500 triggered images. `prediction_drift` reads the ascent that RNP"
            " makes anyway, `neural_cleanse_index` the triggers of `neural_cleanse`, and"
            " `trigger_survival` tries those on the unlearned model: what they read is not in"
            " their seconds."
        ),
        "",
        *costs(part, "detector", [name for name in runs if name != "rnp"]),
        "The four tasks in sum, one method for each:",
        "",
        *table(
            ["task", "seconds"],
            [
                *([title, number(value)] for title, value in found.items()),
                ["**sum**", number(total)],
            ],
        ),
    ]


def poison(part: dict) -> list[str]:
    columns = {"changed": number, "seconds": number, "stamp_seconds": number, "copies": number}
    return [
        (
            "50,000 random images of CIFAR-10's size; random weights where an attack needs a model."
            " `poison` is all of it at the attack's own rate, the making of the trigger included;"
            " `stamp` puts the trigger on all 50,000. `copies` is the peak of memory above that of"
            " the loaded data and model, in copies of the data (154 MB)."
        ),
        "",
        *table(
            ["attack", "images changed", "poison, s", "stamp, s", "copies", "repeats"],
            rows(part["runs"], columns, part["runs"]),
        ),
    ]


def start(part: dict) -> list[str]:
    return [
        (
            "From the start of the process to the call of the stage's function, for `prune`:"
            " imports, options, the check of the whole `params.yaml`. `import torch` is a process"
            " that does nothing else. MLflow is imported when a stage has lasted a minute, or at"
            " the end of the pipeline."
        ),
        "",
        *table(["", "seconds", "repeats"], rows(part["runs"], {"seconds": number}, part["runs"])),
    ]


def demo(part: dict) -> list[str]:
    done = part["runs"]["pipeline"]
    if isinstance(done, dict):
        return []
    (found,) = done
    return [
        (
            "`dvc repro` of the preset `demo` in a new clone, after `rnp setup`, with MLflow."
            " `work` is what the stage's function takes, the rest of its seconds its start and end;"
            " memory is that of its process."
        ),
        "",
        *table(
            ["stage", "seconds", "work, s", "peak memory, MiB"],
            [
                *(
                    [
                        each["stage"],
                        number(each["seconds"]),
                        number(each["work"]),
                        mib(each["peak"]),
                    ]
                    for each in found["stages"]
                ),
                ["**`dvc repro`**", number(found["seconds"]), "", ""],
                ["`rnp setup`", number(found["setup_seconds"]), "", ""],
            ],
        ),
    ]


def noop(part: dict) -> list[str]:
    return [
        "`dvc repro` once more where the pipeline of `demo` has finished.",
        "",
        *table(["", "seconds", "repeats"], rows(part["runs"], {"seconds": number}, part["runs"])),
    ]


def scaling(part: dict) -> list[str]:
    """A row for each point, a column for each phase; then the exponents."""
    runs, lines = part["runs"], []
    lines += [
        (
            "One thing at a time grows from a base: ResNet-18 of width 16, 250 clean images to"
            " optimize on and as many to choose with, 2 % of the neurons tried, 32 by 32 pixels;"
            " settings of `demo` otherwise. The models were trained for four passes over 6,000"
            " generated images with BadNets, so that costs, not decisions, can be read from them."
            " The ascent lasts until its stop, or for about 40 steps, of which each evaluates all"
            " images: its cost is given for a step. Recovery takes 80 steps."
        ),
        "",
    ]
    points = dict.fromkeys(
        tuple(name.split("/")[:2]) for name in runs if not name.startswith("subject/")
    )
    body = []
    for axis, value in points:

        def name(phase):
            return f"{axis}/{value}/{phase}"

        tried = median(runs, name("prune"), "tried")
        body.append(
            [
                f"{axis} {value}",
                number(median(runs, name("unlearn"), "seconds_per_step")),
                number(median(runs, name("recover"), "seconds")),
                number(median(runs, name("prune"), "seconds")),
                number(tried),
                *(
                    mib(median(runs, name(phase), "peak"))
                    for phase in ("unlearn", "recover", "prune")
                ),
                " ".join(repeats(runs, name(phase)) for phase in ("unlearn", "recover", "prune")),
            ]
        )
    lines += table(
        [
            "",
            "unlearn, s a step",
            "recover, s",
            "prune, s",
            "neurons tried",
            "peak, MiB: unlearn",
            "recover",
            "prune",
            "repeats",
        ],
        body,
    )
    lines += ["Exponents *b* of *seconds = a · sizeᵇ*, by least squares in logarithms:", ""]
    lines += table(
        ["", "unlearn, a step", "recover", "prune"],
        [
            [
                axis,
                *(
                    NO if fits.get(phase) is None else f"{fits[phase]:.2f}"
                    for phase in ("unlearn", "recover", "prune")
                ),
            ]
            for axis, fits in part["exponents"].items()
        ],
    )
    return lines


SECTIONS: dict[str, tuple[str, Callable[[dict], list[str]]]] = {
    "start": ("Start of a stage", start),
    "train": ("Training", train),
    "waiting": ("Threads that wait", waiting),
    "poison": ("Poisoning", poison),
    "rnp": ("RNP against the published procedure", rnp),
    "defenses": ("Defenses", defenses),
    "detectors": ("Detectors", detectors),
    "demo": ("The whole pipeline", demo),
    "noop": ("Nothing to do", noop),
    "scaling": ("How cost grows", scaling),
}
