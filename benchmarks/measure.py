"""What one process measures: `python -m benchmarks.measure NAME '{"argument": ...}'` prints its
numbers as JSON, last of all.

Loading is not timed; `peak_memory` is the most memory of the whole process and `loaded` what it had
before the work, in bytes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import poison as poisoning
from benchmarks import reference_rnp
from benchmarks.subprocesses import peak_memory
from rnp.attacks.badnets import BadNets
from rnp.cli.prepare import data_root
from rnp.data.base import Split
from rnp.data.cifar10 import Cifar10
from rnp.data.shapes import Shapes
from rnp.detection.base import Evidence
from rnp.errors import UserError
from rnp.evaluation.metrics import score
from rnp.io.datasets import load_defense_set, load_images, save_defense_set
from rnp.io.files import read_json
from rnp.io.history import read_trajectory
from rnp.io.models import load_model, save_model
from rnp.io.tensors import load_mask, save_mask
from rnp.models.build import Architecture, statistics
from rnp.models.classifier import Classifier
from rnp.params.fields import from_section
from rnp.params.presets import FOLDER as PRESETS
from rnp.params.read import flatten, read_params
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.registry import load
from rnp.seeds import generator
from rnp.training.device import default_device, device_of
from rnp.training.loop import steps_per_epoch
from rnp.training.malloc import keep_freed_pages
from rnp.training.predict import accuracy
from rnp.training.recipe import Train
from rnp.types import DefenseSet, Epoch, ImageSet, backdoor_labels, to_floats
from rnp.unlearn import Unlearn

Numbers = dict[str, object]
LARGEST_DROP = 0.02
"""CA that the reader of a published sweep gives up."""
LEVEL = "0.2"
"""Accuracy of the unlearned checkpoint that sample detectors ask."""


class Clock:
    """Seconds by name: `with clock("name"): work`; what has the same name is added up. `cpu` are
    those of all threads.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, cpu = now(), time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now() - start
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu


def now() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object]) -> tuple[object, Numbers]:
    """What `work` returns; its seconds and memory."""
    loaded, start, cpu = peak_memory(), now(), time.process_time()
    made = work()
    found: Numbers = {
        "seconds": now() - start,
        "cpu_seconds": time.process_time() - cpu,
        "loaded": loaded,
        "peak": peak_memory(),
    }
    if torch.cuda.is_available():
        found["peak_gpu"] = torch.cuda.max_memory_allocated()
    return made, found


class MacCounter:
    """Multiply-adds of convolutions and linear layers in all forward passes while the block lasts,
    whoever runs them.
    """

    def __enter__(self) -> MacCounter:
        self.total = 0
        self.handle = nn.modules.module.register_module_forward_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _count(self, module: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            self.total += output.numel() * module.weight[0].numel()


def cost(model: nn.Module, data: ImageSet) -> int:
    """Multiply-adds of one image."""
    with MacCounter() as work, torch.no_grad():
        model.eval()(to_floats(data.images[:1]).to(device_of(model)))
    return work.total


# ---- train
# ------------------------------------------------------------------------------------------------------------------


def pictures(n: int) -> ImageSet:
    """CIFAR-10's first training images; random ones where it is not to be had."""
    try:
        return Cifar10().load(data_root(), rng=torch.Generator())[0].subset(torch.arange(n))
    except UserError:
        return noise(n)


def noise(n: int) -> ImageSet:
    """Random images of CIFAR-10's size."""
    images = torch.randint(
        0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ImageSet(images, torch.arange(n) % 10, tuple("0123456789"))


class Pictures(Dataset):
    """As torchvision hands out CIFAR-10: a PIL image through the usual transforms, one at a
    time.
    """

    def __init__(self, data: ImageSet) -> None:
        from torchvision import transforms

        self.arrays, self.labels = (
            data.images.permute(0, 2, 3, 1).contiguous().numpy(),
            data.labels.tolist(),
        )
        mean, std = statistics(data)
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(data.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean.tolist(), std.tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


def train_plain(width: int, batch: int, steps: int, warm_up: int, workers: int) -> Numbers:
    """The loop that most people write, in fp32; the loader has enough images never to run dry."""
    data, device = pictures(min(50_000, 2 * (steps + warm_up) * batch)), default_device()
    net = Architecture(width=width).build_for(data, rng=torch.Generator().manual_seed(0)).net
    net = net.to(device, memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        Pictures(data), batch_size=batch, shuffle=True, num_workers=workers, drop_last=True
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def train(n: int) -> float:
        total = 0.0
        for images, labels in itertools.islice(batches, n):
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    train(warm_up)
    _, found = timed(lambda: train(steps))
    return found | {"images_per_second": steps * batch / found["seconds"]}


def train_ours(width: int, batch: int, steps: int, warm_up: int, precision: str) -> Numbers:
    """`Train` for as many steps, after a shorter run; on a GPU the recording is part of the
    seconds, and the rate of all epochs but the first is given too.
    """
    keep_freed_pages()
    data, rng = pictures(min(50_000, steps * batch)), torch.Generator().manual_seed(0)
    model = Architecture(width=width).build_for(data, rng=rng).to(default_device())
    per_epoch, ends = steps_per_epoch(len(data), batch), []
    recipe = Train(
        epochs=max(1, round(steps / per_epoch)),
        batch_size=batch,
        lr=0.1,
        weight_decay=0.001,
        precision=precision,
    )
    replace(recipe, epochs=1)(model, data.subset(torch.arange(warm_up * batch)), rng=rng)
    _, found = timed(
        lambda: recipe(model, data, rng=rng, on_epoch=lambda epoch: ends.append(now()))
    )
    found["images_per_second"] = len(data) * recipe.epochs / found["seconds"]
    if default_device().type == "cuda":
        rest = (
            (recipe.epochs - 1) * len(data) / (ends[-1] - ends[0])
            if recipe.epochs > 1
            else found["images_per_second"]
        )
        found |= {
            "steady_images_per_second": rest,
            "flops": 6 * cost(model, data) * rest,
            "peak_flops": product_peak(),
        }
    return found


def training_steps(steps: int, limit: float) -> Numbers:
    """Steps of a small network in fp32, whose threads wait for one another often: that of the
    preset demo, 32 images each. At most `steps` of them, and none after `limit` seconds.
    """
    keep_freed_pages()
    data = noise(32)
    model = (
        Architecture(arch="resnet10", width=16)
        .build_for(data, rng=torch.Generator().manual_seed(0))
        .train()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels, done = data.as_floats(), data.labels, 0

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    start = time.perf_counter()
    while done < steps and time.perf_counter() - start < limit:
        step()
        done += 1
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "steps": done,
        "milliseconds": 1000 * seconds / done,
        "threads": torch.get_num_threads(),
    }


def product_peak(side: int = 8192, times: int = 20) -> float:
    """Floating-point operations a second of a large bf16 matrix product."""
    a, b = (
        torch.randn(side, side, device=default_device(), dtype=torch.bfloat16) for _ in range(2)
    )
    for _ in range(3):
        a @ b
    start = now()
    for _ in range(times):
        a @ b
    return 2 * side**3 * times / (now() - start)


# ---- the defense, on the folder of a run
# ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A backdoored model, the defender's images and the settings of the run that they come from."""

    folder: Path
    params: dict
    model: Classifier
    defense: DefenseSet

    @classmethod
    def load(cls, folder: str) -> Subject:
        path = Path(folder)
        return cls(
            path,
            read_params(path / "params.yaml"),
            load_model(path / "models/backdoored.safetensors")[0],
            load_defense_set(path / "data/defense"),
        )

    def method(self, kind: type, section: str, prefix: str = "", **changes: object) -> object:
        """`kind` with the settings of the run, and with its own defaults where the run says
        nothing.
        """
        values = dict(flatten(self.params.get(section, {})))
        return from_section(
            kind, values | {f"{prefix}{name}": value for name, value in changes.items()}, prefix
        )

    def rng(self, stage: str) -> torch.Generator:
        return generator(self.params["seed"], stage)

    def tests(self) -> tuple[ImageSet, ImageSet, int | None]:
        """Test images, triggered ones, and the target of the attack."""
        attack = read_json(self.folder / "data/triggered/attack.json")
        return (
            load_images(self.folder / "data/test"),
            load_images(self.folder / "data/triggered/test"),
            attack["target_label"],
        )

    def unlearned(self) -> tuple[nn.Module, list[Epoch]]:
        """The model that sample detectors ask, and the way to the collapse; made anew where the
        run did not get there.
        """
        made = self.folder / "models/unlearned"
        if made.exists():
            level = made / f"accuracy_{LEVEL}.safetensors"
            model = load_model(level if level.exists() else made / "accuracy_end.safetensors")[0]
            return model, read_trajectory(made / "trajectory.csv")
        result = self.method(Unlearn, "unlearn", until_collapse=True)(
            self.model, self.defense.train, rng=self.rng("unlearn")
        )
        result.model.load_state_dict(result.checkpoints.get(LEVEL, result.checkpoints["end"]))
        return result.model, result.trajectory


def rnp_ours(folder: str, to_collapse: bool) -> Numbers:
    """Unlearn, recover and prune as the stages do, then one evaluation; every one is counted in
    `seconds`.
    """
    keep_freed_pages()
    subject, clock = Subject.load(folder), Clock()
    test, attacked, target = subject.tests()
    clean, precision = (
        subject.defense.train,
        subject.params.get("evaluate", {}).get("precision", "auto"),
    )
    each = cost(subject.model, clean)
    methods = (
        subject.method(Unlearn, "unlearn", until_collapse=to_collapse),
        subject.method(Recover, "recover"),
        subject.method(Prune, "prune"),
    )

    def defend() -> tuple:
        with clock("unlearn"):
            unlearned = methods[0](subject.model, clean, rng=subject.rng("unlearn"))
        with clock("recover"):
            recovered = methods[1](unlearned.model, clean, rng=subject.rng("recover"))
        with clock("prune"):
            pruned = methods[2](subject.model, recovered.mask, subject.defense.all)
        with clock("evaluate"):
            return (
                unlearned,
                pruned,
                score(pruned.model, test, attacked, target, precision=precision),
            )

    with MacCounter() as work:
        (unlearned, pruned, scores), found = timed(defend)
    before = score(subject.model, test, attacked, target, precision=precision)
    return found | {
        "phases": clock.seconds,
        "unlearn_steps": unlearned.trajectory[-1].step,
        "recover_steps": methods[1].steps,
        "stopped": unlearned.reached,
        "image_passes": work.total / each,
        "evaluations": 1,
        "pruned": pruned.chosen.pruned,
        "evaluation_seconds": clock.seconds["evaluate"],
        "precision": [*(method.precision for method in methods), precision],
        "n_defense": len(clean),
        "n_clean": len(test),
        "n_triggered": len(attacked),
        **{f"{name}_before": value for name, value in before.flat().items()},
        **scores.flat(),
    }


class Shifted(Dataset):
    """The defense set as the published loader hands it out: cropped and flipped one image at a
    time.
    """

    def __init__(self, data: ImageSet, device: torch.device) -> None:
        from torchvision import transforms

        self.images, self.labels = data.as_floats().to(device), data.labels.to(device)
        self.transform = transforms.Compose(
            [transforms.RandomCrop(data.shape[1:], padding=4), transforms.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[i]), self.labels[i]


def rnp_published(folder: str, unlearn_steps: int, recover_steps: int, quick: bool) -> Numbers:
    """The published procedure, which tests on all test images after every epoch and at every
    threshold.

    `seconds` are those of as many optimizer steps as ours takes, in whole epochs. The ascent goes
    on beyond them, or to them, for the sake of its own stop: the masks are learned from where the
    published rule stops, and `own_seconds` count to there. `quick` measures one epoch of each kind
    and one evaluation, each after one that does not count, and multiplies; it reaches no model.
    """
    torch.manual_seed(98)
    subject = Subject.load(folder)
    victim, device = subject.model.set_layout("the published code knows no other"), default_device()
    clean = subject.defense.train
    test, attacked, target = subject.tests()
    goals = backdoor_labels(attacked.labels, target, len(attacked.classes))
    train = DataLoader(Shifted(clean, device), batch_size=128, shuffle=True)
    tests = [
        DataLoader(TensorDataset(data.as_floats().to(device), labels.to(device)), batch_size=128)
        for data, labels in ((test, test.labels), (attacked, goals))
    ]
    per_epoch = len(train)
    epochs, recover_epochs = (
        math.ceil(unlearn_steps / per_epoch),
        math.ceil(recover_steps / per_epoch),
    )

    def evaluate(model: nn.Module) -> tuple[float, float]:
        return tuple(reference_rnp.evaluate(model, loader)[1] for loader in tests)

    def passes(unlearning: int) -> int:
        """Images of one run with so many epochs of unlearning."""
        evaluations = unlearning + recover_epochs + len(reference_rnp.THRESHOLDS)
        return (unlearning + recover_epochs) * len(clean) + evaluations * (
            len(test) + len(attacked)
        )

    common = {
        "unlearn_steps": epochs * per_epoch,
        "recover_steps": recover_epochs * per_epoch,
        "recover_epochs": recover_epochs,
        "image_passes": passes(epochs),
        "evaluations": epochs + recover_epochs + len(reference_rnp.THRESHOLDS),
        "n_clean": len(test),
        "n_triggered": len(attacked),
    }
    if quick:
        return common | extrapolated(victim, lambda: train, evaluate, epochs, recover_epochs)

    before, loaded, cpu = evaluate(victim), peak_memory(), time.process_time()
    ways, testing, stopped = [], [], False
    loop = reference_rnp.ascent(victim, lambda: train, epochs=max(21, epochs))

    def assess(model: nn.Module) -> tuple[float, float]:
        start = now()
        found = evaluate(model)
        testing.append(now() - start)
        return found

    while len(ways) < epochs or (not stopped and len(ways) < 21):
        start = now()
        model, running = next(loop)
        assess(model)
        ways.append(now() - start)
        if not stopped:
            stopped, own = running <= reference_rnp.STOP, len(ways)
            kept = copy.deepcopy(model) if stopped else model
    clock = Clock()
    with clock("recover"):
        for model, masks in reference_rnp.recovery(kept, lambda: train, epochs=recover_epochs):
            assess(model)
    points = []
    with clock("prune"), tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "mask_values.txt")
        reference_rnp.write_masks(path, masks)
        for threshold, pruned, model in reference_rnp.sweep(victim, path):
            ca, asr = assess(model)
            points.append(
                {
                    "threshold": threshold,
                    "pruned": pruned,
                    "clean_accuracy": ca,
                    "attack_success_rate": asr,
                }
            )
    rest = sum(clock.seconds.values())
    return common | {
        "seconds": sum(ways[:epochs]) + rest,
        "own_seconds": sum(ways[:own]) + rest,
        "own_unlearn_steps": own * per_epoch,
        "stopped": stopped,
        "phases": {"unlearn": sum(ways[:epochs]), **clock.seconds},
        "extrapolated": False,
        "sweep": points,
        "evaluation_seconds": sum(testing[:epochs] + testing[len(ways) :]),
        "clean_accuracy_before": before[0],
        "attack_success_rate_before": before[1],
        **oracle(points, before[0]),
        "cpu_seconds": time.process_time() - cpu,
        "loaded": loaded,
        "peak": peak_memory(),
    }


def extrapolated(
    victim: nn.Module,
    batches: reference_rnp.Batches,
    evaluate: Callable[[nn.Module], object],
    epochs: int,
    recover_epochs: int,
) -> Numbers:
    """What the published run would take, from one epoch of each kind and one evaluation."""
    clock = Clock()
    model, _ = next(reference_rnp.ascent(victim, batches))  # what comes first is slower
    next(reference_rnp.recovery(model, batches))
    evaluate(victim)
    with clock("unlearn"):
        next(reference_rnp.ascent(victim, batches))
    with clock("recover"):
        next(reference_rnp.recovery(model, batches))
    with clock("evaluate"):
        evaluate(victim)
    one = clock.seconds
    evaluations = (epochs + recover_epochs + len(reference_rnp.THRESHOLDS)) * one["evaluate"]
    return {
        "seconds": epochs * one["unlearn"] + recover_epochs * one["recover"] + evaluations,
        "evaluation_seconds": evaluations,
        "extrapolated": True,
        "measured": one,
        "measured_cpu": clock.cpu,
        "peak": peak_memory(),
    }


def oracle(points: list[Numbers], before: float) -> Numbers:
    """The point that a reader would choose who sees the test set: the lowest ASR at a fall of CA
    by at most `LARGEST_DROP`.
    """
    allowed = [point for point in points if before - point["clean_accuracy"] <= LARGEST_DROP]
    return min(allowed or points[:1], key=lambda point: point["attack_success_rate"])


def defense(folder: str, name: str) -> Numbers:
    keep_freed_pages()
    subject = Subject.load(folder)
    method = subject.method(load("defense", name), "defenses", f"{name}.")
    rng = subject.rng(f"defend/{name}")
    return timed(lambda: method.repair(subject.model, subject.defense, rng=rng))[1]


def defense_rnp(folder: str) -> Numbers:
    """Our three steps without a test image, as the other defenses are measured; with the ascent to
    the collapse, as in the pipeline.
    """
    keep_freed_pages()
    subject = Subject.load(folder)
    unlearn, recover, prune = (
        subject.method(kind, kind.__name__.lower()) for kind in (Unlearn, Recover, Prune)
    )

    def defend() -> None:
        unlearned = unlearn(subject.model, subject.defense.train, rng=subject.rng("unlearn"))
        recovered = recover(unlearned.model, subject.defense.train, rng=subject.rng("recover"))
        prune(subject.model, recovered.mask, subject.defense.all)

    return timed(defend)[1]


def detector(folder: str, family: str, name: str, images: int) -> Numbers:
    """One detector; what those of the label judge by is made before, by unlearning and by
    `neural_cleanse`.
    """
    keep_freed_pages()
    subject = Subject.load(folder)
    method = subject.method(load(family, name), "detect", f"{name}.")
    model, clean, rng = subject.model, subject.defense.train, subject.rng(f"{family}/{name}")
    if family == "triggers":

        def work():
            return method.recover(model, clean, rng=rng)
    elif family == "samples":
        test, attacked, _ = subject.tests()
        shown = torch.cat([part.images[:images] for part in (test, attacked)])
        weak = subject.unlearned()[0] if method.needs_unlearned else None

        def work():
            return method.score(model, shown, clean, rng=rng, unlearned=weak)
    else:
        search = subject.method(
            load("triggers", "neural_cleanse"), "detect", "neural_cleanse.", steps=1
        )
        found = search.recover(model, clean, rng=rng) if method.needs_triggers else []
        evidence = Evidence(
            model, found, *(subject.unlearned() if method.needs_unlearned else (model, []))
        )

        def work():
            return method.score_evidence(evidence, clean, rng=rng)

    return timed(work)[1]


def poison(name: str) -> Numbers:
    keep_freed_pages()
    return poisoning.measure(name)


# ---- how cost grows
# ---------------------------------------------------------------------------------------------------------


def demo(kind: type, **changes: object) -> object:
    """`kind` with the settings of the preset demo."""
    section = dict(flatten(read_params(PRESETS / "demo.yaml").get(kind.__name__.lower(), {})))
    return from_section(kind, section | changes)


def scale_subject(folder: str, width: int, side: int) -> Numbers:
    """Write a backdoored ResNet-18, trained for four passes over 6,000 generated shapes, and 2,000
    clean images of the defender.
    """
    keep_freed_pages()
    rng, path = torch.Generator().manual_seed(0), Path(folder)
    train, test = Shapes(train=8000, test=1000, size=side).load(path, rng=rng)
    splits = Split(defense_train=1000, defense_val=1000)(train, test, rng=rng)
    attack, architecture = BadNets(), Architecture(arch="resnet18", width=width)
    data = attack.poison(splits.pool, rng=rng).apply(splits.pool)
    model = architecture.build_for(data, rng=rng).to(default_device())
    recipe = Train(epochs=4, batch_size=32, lr=0.05, weight_decay=0.005)
    _, found = timed(lambda: recipe(model, data, rng=rng))
    save_model(path / "model.safetensors", model, architecture, data.classes)
    save_defense_set(path / "defense", splits.defense)
    return found | {"clean_accuracy": accuracy(model, test, precision="auto")}


def scale_unlearn(folder: str, images: int) -> Numbers:
    """At most 40 steps, for models that do not stop by themselves."""
    keep_freed_pages()
    path, clean = Path(folder), first_images(folder, images).train
    model, architecture, classes = load_model(path / "model.safetensors")
    unlearn = demo(Unlearn, until_collapse=False)
    unlearn = demo(
        Unlearn, until_collapse=False, epochs=math.ceil(40 / math.ceil(images / unlearn.batch_size))
    )
    made, found = timed(lambda: unlearn(model, clean, rng=generator(0, "unlearn")))
    save_model(path / "unlearned.safetensors", made.model, architecture, classes)
    steps = made.trajectory[-1].step
    return found | {"steps": steps, "seconds_per_step": found["seconds"] / steps}


def scale_recover(folder: str, images: int) -> Numbers:
    keep_freed_pages()
    path, clean, recover = Path(folder), first_images(folder, images).train, demo(Recover)
    model, _, _ = load_model(path / "unlearned.safetensors")
    made, found = timed(lambda: recover(model, clean, rng=generator(0, "recover")))
    save_mask(path / "mask.safetensors", made.mask)
    return found | {"steps": recover.steps}


def scale_prune(folder: str, images: int, max_fraction: float) -> Numbers:
    keep_freed_pages()
    path, clean = Path(folder), first_images(folder, images).all
    model, mask = load_model(path / "model.safetensors")[0], load_mask(path / "mask.safetensors")
    made, found = timed(lambda: demo(Prune, max_fraction=max_fraction)(model, mask, clean))
    return found | {
        "tried": int(max_fraction * sum(map(len, mask.values()))),
        "pruned": made.chosen.pruned,
    }


def first_images(folder: str, images: int) -> DefenseSet:
    """The first images of each half; their classes are spread evenly."""
    both = load_defense_set(Path(folder) / "defense")
    return DefenseSet(*(part.subset(torch.arange(images)) for part in (both.train, both.val)))


MEASURES = {
    work.__name__: work
    for work in (
        train_plain,
        train_ours,
        training_steps,
        rnp_ours,
        rnp_published,
        defense,
        defense_rnp,
        detector,
        poison,
        scale_subject,
        scale_unlearn,
        scale_recover,
        scale_prune,
    )
}


if __name__ == "__main__":
    print(json.dumps(MEASURES[sys.argv[1]](**json.loads(sys.argv[2]))))
