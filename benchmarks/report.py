"""The tables of the benchmark, from its raw numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from benchmarks.subprocesses import Runs, median
from rnp.training.openmp import SPINS

FOUR_TASKS = {
    "removal: RNP, with the ascent to the collapse": "rnp",
    "trigger: neural_cleanse": "triggers/neural_cleanse",
    "label: prediction_drift, from the same ascent": "labels/prediction_drift",
    "samples: unlearned_confidence": "samples/unlearned_confidence",
}
"""One method for each of the four tasks, by its run in the part `detectors`."""
MIB = 2**20
ABSENT = "–"
PHASES = ("unlearn", "recover", "prune")
INTRODUCTION = (
    "Made by `make bench`, or `rnp bench`; the raw numbers with all repeats are in the JSON file"
    " beside this page. Numbers are medians over repeats, of which there is one where a measurement"
    " takes over a minute. Each measurement is a process of its own. Below each title is the"
    " machine that gave the numbers; where its load average was not near 0, other processes were"
    " running and the seconds are too many. The JSON file holds processor seconds too."
)
RATIOS = {
    "rnp_vs_published": "RNP against the published procedure",
    "rnp_fp32_vs_published": "RNP in fp32 against the published procedure",
    "rnp_rebuilt_vs_published": "RNP with rebuilding against the published procedure",
    "rnp_rebuilt_fp32_vs_published": "RNP with rebuilding in fp32 against the published procedure",
    "train_vs_fp32": "training against a plain fp32 loop",
}
RNP_WAYS = {
    "rnp_vs_published": "ours",
    "rnp_fp32_vs_published": "ours, fp32",
    "rnp_rebuilt_vs_published": "ours, rebuilt",
    "rnp_rebuilt_fp32_vs_published": "ours, rebuilt, fp32",
}
"""The run that each ratio compares with the published procedure."""
SECONDS = {
    "stage_start": "start of a stage",
    "noop_repro": "`dvc repro` with nothing to do",
    "demo_pipeline": "`dvc repro` of demo from nothing",
}
REBUILT = (
    " *Rebuilt* has the settings of `rnp_rebuild`, which prunes past neurons that clean images"
    " need, by the budget for an evident label, and then rebuilds the model, here against no"
    " trigger: looking for labels and triggers is not in its seconds."
)
Format = Callable[[float | None], str]


def headline(parts: dict[str, dict]) -> dict[str, dict]:
    """The most important numbers; what was not measured is absent.

    `ratio` is by device, `seconds` are those of the CPU where both were measured.
    """
    ratio: dict[str, dict[str, float]] = {name: {} for name in RATIOS}
    seconds: dict[str, float] = {}
    for name, part in sorted(parts.items(), key=lambda item: item[1]["device"] == "cpu"):
        base = base_name(name, part)
        runs = part.get("runs", {})
        if base == "train":
            ours, plain = (median(runs, name, "images_per_second") for name in ("ours", "plain"))
            put(ratio["train_vs_fp32"], part["device"], quotient(ours, plain))
        elif base == "rnp":
            published = median(runs, "published", "seconds")
            for key, way in RNP_WAYS.items():
                ours = median(runs, way, "seconds")
                put(ratio[key], part["device"], quotient(published, ours))
        elif base == "start":
            put(seconds, "stage_start", median(runs, "stage, tracking on", "seconds"))
        elif base == "demo":
            put(seconds, "demo_pipeline", median(runs, "pipeline", "seconds"))
        elif base == "noop":
            put(seconds, "noop_repro", median(runs, "repro", "seconds"))
    return {"ratio": ratio, "seconds": seconds}


def base_name(name: str, part: dict) -> str:
    """The name of a part without its device."""
    return name.removesuffix(f"_{part['device']}")


def put(numbers: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        numbers[name] = value


def quotient(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def markdown(record: dict, *, picture: str) -> str:
    """The page; `picture` is the path of the plot of `scaling`, relative to the page."""
    lines = ["# Benchmarks", "", INTRODUCTION, ""]
    ratios = [
        [title, number(value), device]
        for key, title in RATIOS.items()
        for device, value in record["ratio"][key].items()
    ]
    lines += table(["", "ours is faster by a factor of", "device"], ratios)
    seconds = [
        [title, number(record["seconds"][key])]
        for key, title in SECONDS.items()
        if key in record["seconds"]
    ]
    lines += table(["", "seconds"], seconds)
    for name, part in record["parts"].items():
        lines += section(base_name(name, part), part)
        if base_name(name, part) == "scaling" and "runs" in part:
            lines += [f"![seconds against size]({picture})", ""]
    return "\n".join(lines).rstrip() + "\n"


def section(name: str, part: dict) -> list[str]:
    """Title, origin and tables of a part, and what failed in it."""
    title, write = SECTIONS[name]
    device = "" if part["device"] == "cpu" else f" ({part['device']})"
    lines = [f"## {title}{device}", "", f"*{origin(part)}*", ""]
    if "failed" in part:
        return [*lines, f"**Failed**: {part['failed']}", ""]
    failed = {run: done["failed"] for run, done in part["runs"].items() if isinstance(done, dict)}
    reasons = [f"**Failed**: {run}: {reason}" for run, reason in failed.items()]
    return [*lines, *write(part), *reasons, *([""] if reasons else [])]


def origin(part: dict) -> str:
    """Machine, versions, commit and time of a part, in one line."""
    machine = part["machine"]
    versions = ", ".join(
        f"{name} {part['versions'][name]}"
        for name in ("torch", "Python", "python")
        if name in part["versions"]
    )
    dirty = "-dirty" if part["commit"].endswith("-dirty") else ""
    commit = f"commit {part['commit'][:8]}{dirty}, " if part["commit"] else ""
    arithmetic = "bf16 is native" if machine["bf16"] else "no native bf16, `auto` is fp32"
    load = "" if part["load"] is None else f"; load average {part['load']:.1f} before it began"
    return (
        f"{machine['name']}; {machine['memory_gib']:g} GiB; {arithmetic};"
        f" {versions}; {commit}{part['made']} UTC{load}"
    )


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a Markdown table; none without rows."""
    rows = list(rows)
    if not rows:
        return []
    lines = (head, ["---"] * len(head), *rows)
    return [*("| " + " | ".join(cells) + " |" for cells in lines), ""]


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never as a power of ten."""
    if value is None:
        return ABSENT
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.4f}" if "e" in text else text


def mib(value: float | None) -> str:
    return ABSENT if value is None else f"{value / MIB:,.0f}"


def share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def repeats(runs: Runs, name: str) -> str:
    return "failed" if isinstance(runs.get(name), dict) else str(len(runs.get(name, [])))


def rows(runs: Runs, columns: Mapping[str, Format], names: Iterable[str]) -> Iterator[list[str]]:
    """Name, the median of each column, repeats."""
    for name in names:
        medians = (write(median(runs, name, key)) for key, write in columns.items())
        yield [name, *medians, repeats(runs, name)]


def memory(part: dict) -> dict[str, str]:
    """The columns of memory, with their titles."""
    columns = {"peak": "peak memory, MiB"}
    return columns if part["device"] == "cpu" else columns | {"peak_gpu": "on the GPU, MiB"}


def costs(part: dict, first: str, names: Iterable[str]) -> list[str]:
    """A table of seconds and memory."""
    columns = memory(part)
    body = rows(part["runs"], {"seconds": number, **dict.fromkeys(columns, mib)}, names)
    return table([first, "seconds", *columns.values(), "repeats"], body)


def renamed(body: Iterable[list[str]], titles: dict[str, str]) -> list[list[str]]:
    """Rows with titles in place of their names."""
    return [[titles[name], *cells] for name, *cells in body]


def train(part: dict) -> list[str]:
    runs = part["runs"]
    titles = {
        "plain": "plain loop, fp32",
        "ours": "`rnp`, precision auto",
        "ours, fp32": "`rnp`, fp32",
    }
    ours = runs["ours"][0] if isinstance(runs.get("ours"), list) else {}
    columns = {"steps": number, "images_per_second": number, **dict.fromkeys(memory(part), mib)}
    head = ["", "steps", "images a second", *memory(part).values(), "repeats"]
    text = (
        f"ResNet-18 of width {ours.get('width', ABSENT)}, batches of {ours.get('batch', ABSENT)}"
        " images of 32 by 32 pixels. The plain loop takes PIL images through torchvision's"
        " transforms (crop, flip, normalize), with loader workers, contiguous tensors and"
        " `loss.item()` at each step; ours is `Train`, which augments whole batches."
    )
    lines = [text, "", *table(head, renamed(rows(runs, columns, titles), titles))]
    return [*lines, on_a_gpu(ours), ""] if "flops" in ours else lines


def on_a_gpu(ours: dict) -> str:
    """The rate without the capture of CUDA graphs, as a share of the card's peak."""
    return (
        "On a GPU steps are captured as CUDA graphs, which takes time at the start of a run: after"
        f" its first epoch {number(ours['steady_images_per_second'])} images a second,"
        f" {ours['flops'] / 1e12:.0f} TFLOP/s of convolutions and linear layers,"
        f" {ours['flops'] / ours['peak_flops']:.0%} of the {ours['peak_flops'] / 1e12:.0f}"
        " that a bf16 product of matrices of 8,192 by 8,192 reaches on this card."
    )


def waiting(part: dict) -> list[str]:
    titles = {
        f"{way}, {where}": f"{title}, {where}"
        for where in ("alone", "beside a busy process")
        for way, title in (("ours", "as set by `rnp`"), ("untouched", "as set by libgomp"))
    }
    body = rows(part["runs"], {"milliseconds": number, "steps": number}, titles)
    text = (
        "A step of a small network (ResNet-10 of width 16, 32 images of 32 by 32 pixels, fp32),"
        " whose threads wait for one another in every layer: `rnp` lets them spin for"
        f" {SPINS:,} turns and then sleep, libgomp by itself for longer. The busy process uses all"
        " of one core."
    )
    return [text, "", *table(["", "ms a step", "steps", "repeats"], renamed(body, titles))]


RNP_COLUMNS: dict[str, tuple[str, Format]] = {
    "seconds": ("seconds", number),
    "evaluation_seconds": ("of it evaluations, s", number),
    "peak": ("peak, MiB", mib),
    "unlearn_steps": ("unlearning steps", number),
    "recover_steps": ("recovery steps", number),
    "evaluations": ("evaluations", number),
    "forward_passes": ("forward passes", number),
    "backward_passes": ("backward passes", number),
    "clean_accuracy_before": ("CA before", share),
    "attack_success_rate_before": ("ASR before", share),
    "clean_accuracy": ("CA", share),
    "attack_success_rate": ("ASR", share),
}


def rnp(part: dict) -> list[str]:
    runs = part["runs"]
    ours, rebuilt, published = (
        runs[name][0] if isinstance(runs.get(name), list) else None
        for name in ("ours", "ours, rebuilt", "published")
    )
    counts = ours or published or {}
    text = (
        f"The backdoored model of a run of `{part['subject']}`, {counts.get('n_clean', 0):,} test"
        f" images and {counts.get('n_triggered', 0):,} triggered ones; the same weights and images"
        " for both. *Ours* unlearns, recovers and prunes with the settings of the run and is then"
        " evaluated once; its ascent ends at the stop, as the published one does, or continues *to"
        f" collapse*, as it does in the pipeline for the detectors.{REBUILT if rebuilt else ''}"
        " *Published* is a plain restatement (fp32, contiguous tensors, a DataLoader, learning"
        " rate 0.01): it takes as many optimizer steps as *ours*, in whole epochs, and"
        " evaluates the model on all test images after every epoch and at each of 19"
        " thresholds. Its masks are learned from where its own rule stops; its CA and ASR are"
        " those of the threshold with the lowest ASR among those that cost at most two points"
        " of CA. That threshold is chosen on the test images, which flatters it: ours is chosen"
        " on the defense set. Passes are those of an image: multiply-adds over those of one"
        " forward pass, or of two for a backward pass."
    )
    names = [name for name in runs if name != "published"] + ["published"]
    columns = {key: write for key, (_, write) in RNP_COLUMNS.items()}
    head = ["", *(title for title, _ in RNP_COLUMNS.values()), "repeats"]
    notes = [
        *(published_notes(published) if published else ()),
        *(phases("Ours", ours) if ours else ()),
        *(phases("Rebuilt", rebuilt) if rebuilt else ()),
    ]
    lines = [text, "", *table(head, rows(runs, columns, names))]
    return [*lines, *(line for note in notes for line in (note, ""))]


def published_notes(published: dict) -> Iterator[str]:
    """What to know about the numbers of the published procedure."""
    if published["recover_epochs"] != 20:
        yield (
            f"With these images {published['recover_steps']} steps of recovery are"
            f" {published['recover_epochs']} epochs, each with its evaluation; the published run"
            " has 500 images and 20 epochs."
        )
    if published["extrapolated"]:
        yield (
            "The seconds of *published* are **extrapolated** from one epoch of each kind and one"
            " evaluation; no model was made."
        )
        return
    yield (
        f"The published rule {'stops' if published['stopped'] else 'had not stopped'} after"
        f" {published['own_unlearn_steps']} steps of unlearning; counted to there the published"
        f" run takes {number(published['own_seconds'])} s."
    )


def phases(name: str, ours: dict) -> Iterator[str]:
    """The seconds of each phase of ours."""
    seconds = (
        f"{name} {number(value)} s ({precision})"
        for (name, value), precision in zip(ours["phases"].items(), ours["precision"])
    )
    yield f"{name}, by phase and its `precision`: {', '.join(seconds)}."


def defenses(part: dict) -> list[str]:
    text = (
        f"Each on the same backdoored model of a run of `{part['subject']}`, with the settings of"
        " that run or, where it has none, its defaults; without loading and without a test image."
    )
    return [text, "", *costs(part, "defense", part["runs"])]


def detectors(part: dict) -> list[str]:
    runs = part["runs"]
    seconds = {title: median(runs, name, "seconds") for title, name in FOUR_TASKS.items()}
    values = [value for value in seconds.values() if value is not None]
    total = sum(values) if len(values) == len(seconds) else None
    text = (
        f"Each on the backdoored model of a run of `{part['subject']}`; sample detectors have 500"
        " clean and 500 triggered images. `prediction_drift` reads the ascent that RNP makes"
        " anyway, `neural_cleanse_index` the triggers of `neural_cleanse`, and `trigger_survival`"
        " tries those on the unlearned model: making these is not in their seconds."
    )
    body = [[title, number(value)] for title, value in seconds.items()]
    return [
        text,
        "",
        *costs(part, "detector", [name for name in runs if name != "rnp"]),
        "The four tasks in sum, one method for each:",
        "",
        *table(["task", "seconds"], [*body, ["**sum**", number(total)]]),
    ]


def poison(part: dict) -> list[str]:
    columns = {"changed": number, "seconds": number, "stamp_seconds": number, "copies": number}
    head = ["attack", "images changed", "poison, s", "stamp, s", "copies", "repeats"]
    text = (
        "50,000 random images of CIFAR-10's size; random weights where an attack needs a model."
        " `poison` is all of it at the attack's own rate, the making of the trigger included;"
        " `stamp` applies the trigger to all 50,000. `copies` is the peak of memory above that of"
        " the loaded data and model, in copies of the data (154 MB)."
    )
    return [text, "", *table(head, rows(part["runs"], columns, part["runs"]))]


def start(part: dict) -> list[str]:
    text = (
        "From the start of the process to the call of the stage's function, for `prune`: imports,"
        " options, the check of the whole `params.yaml`. `import torch` is a process that does"
        " nothing else. MLflow is imported when a stage has lasted a minute, or at the end of the"
        " pipeline."
    )
    return [text, "", *seconds_table(part["runs"])]


def seconds_table(runs: Runs) -> list[str]:
    return table(["", "seconds", "repeats"], rows(runs, {"seconds": number}, runs))


def demo(part: dict) -> list[str]:
    results = part["runs"]["pipeline"]
    if isinstance(results, dict):
        return []
    (result,) = results
    text = (
        "`dvc repro` of the preset `demo` in a new clone, after `rnp setup`, with MLflow. `work`"
        " are the seconds of the stage's function, the rest of its seconds its start and end;"
        " memory is that of its process."
    )
    body = [
        [stage["stage"], number(stage["seconds"]), number(stage["work"]), mib(stage["peak"])]
        for stage in result["stages"]
    ]
    body.append(["**`dvc repro`**", number(result["seconds"]), "", ""])
    body.append(["`rnp setup`", number(result["setup_seconds"]), "", ""])
    return [text, "", *table(["stage", "seconds", "work, s", "peak memory, MiB"], body)]


def noop(part: dict) -> list[str]:
    text = "`dvc repro` once more where the pipeline of `demo` has finished."
    return [text, "", *seconds_table(part["runs"])]


def scaling(part: dict) -> list[str]:
    """A row for each point, a column for each phase; then the exponents."""
    runs = part["runs"]
    text = (
        "One size at a time grows from a base: ResNet-18 of width 16, 250 clean images to optimize"
        " on and as many to choose with, 2 % of the neurons tried, 32 by 32 pixels; settings of"
        " `demo` otherwise. The models were trained for four passes over 6,000 generated images"
        " with BadNets, so that costs, not decisions, can be read from them. The ascent lasts until"
        " its stop, or for about 40 steps, each of which evaluates all images: its cost is given"
        " for a step. Recovery takes 80 steps."
    )
    points = dict.fromkeys(
        tuple(name.split("/")[:2]) for name in runs if not name.startswith("subject/")
    )
    head = ["", "unlearn, s a step", "recover, s", "prune, s", "neurons tried"]
    head += ["peak, MiB: unlearn", "recover", "prune", "repeats"]
    fits = [
        [axis, *(exponent_text(exponents.get(phase)) for phase in PHASES)]
        for axis, exponents in part["exponents"].items()
    ]
    return [
        text,
        "",
        *table(head, [point_row(runs, axis, value) for axis, value in points]),
        "Exponents *b* of *seconds = a · sizeᵇ*, by least squares in logarithms:",
        "",
        *table(["", "unlearn, a step", "recover", "prune"], fits),
    ]


def point_row(runs: Runs, axis: str, value: str) -> list[str]:
    """The costs of the three phases at one point."""
    unlearn, recover, prune = (f"{axis}/{value}/{phase}" for phase in PHASES)
    names = (unlearn, recover, prune)
    return [
        f"{axis} {value}",
        number(median(runs, unlearn, "seconds_per_step")),
        number(median(runs, recover, "seconds")),
        number(median(runs, prune, "seconds")),
        number(median(runs, prune, "tried")),
        *(mib(median(runs, name, "peak")) for name in names),
        " ".join(repeats(runs, name) for name in names),
    ]


def exponent_text(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


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
