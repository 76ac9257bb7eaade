"""Measurement of the published procedure, which tests the model after every step of its work."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import reference_rnp
from benchmarks.measure_defenses import Subject
from benchmarks.subprocesses import Result, peak_memory
from rnp.clock import Clock, now
from rnp.training.device import default_device
from rnp.types import ImageSet, NeuronMask, backdoor_labels

LARGEST_DROP = 0.02
"""CA that the reader of a published sweep gives up."""
LAST_EPOCH = 21
"""Epochs of the ascent, at most."""


class ShiftedImages(Dataset):
    """The defense set as the published loader returns it: cropped and flipped one by one."""

    def __init__(self, data: ImageSet, device: torch.device) -> None:
        from torchvision import transforms

        self.images = data.as_floats().to(device)
        self.labels = data.labels.to(device)
        self.transform = transforms.Compose(
            [transforms.RandomCrop(data.shape[1:], padding=4), transforms.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[i]), self.labels[i]


class PublishedRun:
    """The published procedure on the folder of a run; it evaluates on all test images."""

    def __init__(self, folder: str) -> None:
        subject = Subject.load(folder)
        device = default_device()
        self.model = subject.model.set_layout("the published code knows no other")
        test, attacked, target = subject.tests()
        goals = backdoor_labels(attacked.labels, target, len(attacked.classes))
        self.n_defense = len(subject.defense.train)
        self.n_clean = len(test)
        self.n_triggered = len(attacked)
        images = ShiftedImages(subject.defense.train, device)
        self.train = DataLoader(images, batch_size=128, shuffle=True)
        self.tests = [
            DataLoader(
                TensorDataset(data.as_floats().to(device), labels.to(device)), batch_size=128
            )
            for data, labels in ((test, test.labels), (attacked, goals))
        ]
        self.evaluation_seconds: list[float] = []

    def batches(self) -> DataLoader:
        return self.train

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """CA and ASR."""
        start = now()
        ca, asr = (reference_rnp.evaluate(model, loader)[1] for loader in self.tests)
        self.evaluation_seconds.append(now() - start)
        return ca, asr

    def counts(self, epochs: int, recover_epochs: int) -> Result:
        """Steps, evaluations and passes of an image of a run of so many epochs.

        In recovery the weights have no gradient, so a backward pass is half of one in unlearning.
        """
        evaluations = epochs + recover_epochs + len(reference_rnp.THRESHOLDS)
        tested = evaluations * (self.n_clean + self.n_triggered)
        return {
            "unlearn_steps": epochs * len(self.train),
            "recover_steps": recover_epochs * len(self.train),
            "recover_epochs": recover_epochs,
            "forward_passes": (epochs + recover_epochs) * self.n_defense + tested,
            "backward_passes": (epochs + recover_epochs / 2) * self.n_defense,
            "evaluations": evaluations,
            "n_clean": self.n_clean,
            "n_triggered": self.n_triggered,
        }


def rnp_published(folder: str, unlearn_steps: int, recover_steps: int, quick: bool) -> Result:
    """The published procedure, which evaluates after every epoch and at every threshold.

    `seconds` are those of as many optimizer steps as ours takes, in whole epochs. The ascent goes
    on beyond them where its own stop comes later: the masks are learned from where the published
    rule stops, and `own_seconds` count to there. `quick` measures one epoch of each kind and one
    evaluation, each after one that does not count, and multiplies; it makes no model.
    """
    torch.manual_seed(98)
    run = PublishedRun(folder)
    epochs = math.ceil(unlearn_steps / len(run.train))
    recover_epochs = math.ceil(recover_steps / len(run.train))
    measured = extrapolated if quick else complete
    return run.counts(epochs, recover_epochs) | measured(run, epochs, recover_epochs)


@dataclass
class Ascent:
    """The published unlearning: the seconds of its epochs, and where its own rule stopped."""

    model: nn.Module
    seconds: list[float] = field(default_factory=list)
    own_epochs: int = 0
    stopped: bool = False


def complete(run: PublishedRun, epochs: int, recover_epochs: int) -> Result:
    """All numbers of a run."""
    before = run.evaluate(run.model)
    run.evaluation_seconds.clear()
    loaded = peak_memory()
    cpu = time.process_time()
    ascent = unlearn(run, epochs)
    clock = Clock()
    with clock("recover"):
        masks = recover(run, ascent.model, recover_epochs)
    with clock("prune"):
        points = list(sweep(run, masks))
    rest = sum(clock.seconds.values())
    evaluations = [
        *run.evaluation_seconds[:epochs],
        *run.evaluation_seconds[len(ascent.seconds) :],
    ]
    return {
        "seconds": sum(ascent.seconds[:epochs]) + rest,
        "own_seconds": sum(ascent.seconds[: ascent.own_epochs]) + rest,
        "own_unlearn_steps": ascent.own_epochs * len(run.train),
        "stopped": ascent.stopped,
        "phases": {"unlearn": sum(ascent.seconds[:epochs]), **clock.seconds},
        "extrapolated": False,
        "sweep": points,
        "evaluation_seconds": sum(evaluations),
        "clean_accuracy_before": before[0],
        "attack_success_rate_before": before[1],
        **oracle(points, before[0]),
        "cpu_seconds": time.process_time() - cpu,
        "loaded": loaded,
        "peak": peak_memory(),
    }


def unlearn(run: PublishedRun, epochs: int) -> Ascent:
    """At least `epochs`, and on to the stop of the published rule."""
    ascent = Ascent(run.model)
    loop = reference_rnp.ascent(run.model, run.batches, epochs=max(LAST_EPOCH, epochs))
    while len(ascent.seconds) < epochs or (not ascent.stopped and len(ascent.seconds) < LAST_EPOCH):
        start = now()
        model, running_accuracy = next(loop)
        run.evaluate(model)
        ascent.seconds.append(now() - start)
        if not ascent.stopped:
            ascent.stopped = running_accuracy <= reference_rnp.STOP
            ascent.own_epochs = len(ascent.seconds)
            ascent.model = copy.deepcopy(model) if ascent.stopped else model
    return ascent


def recover(run: PublishedRun, unlearned: nn.Module, epochs: int) -> NeuronMask:
    masks: NeuronMask = {}
    for model, learned in reference_rnp.recovery(unlearned, run.batches, epochs=epochs):
        run.evaluate(model)
        masks = learned
    return masks


def sweep(run: PublishedRun, masks: NeuronMask) -> Iterator[Result]:
    """A point for each threshold."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mask_values.txt")
        reference_rnp.write_masks(path, masks)
        for threshold, pruned, model in reference_rnp.sweep(run.model, path):
            ca, asr = run.evaluate(model)
            yield {
                "threshold": threshold,
                "pruned": pruned,
                "clean_accuracy": ca,
                "attack_success_rate": asr,
            }


def extrapolated(run: PublishedRun, epochs: int, recover_epochs: int) -> Result:
    """The seconds of the run, from one epoch of each kind and one evaluation."""
    clock = Clock()
    # The first of each is slower, and does not count.
    model, _ = next(reference_rnp.ascent(run.model, run.batches))
    next(reference_rnp.recovery(model, run.batches))
    run.evaluate(run.model)
    with clock("unlearn"):
        next(reference_rnp.ascent(run.model, run.batches))
    with clock("recover"):
        next(reference_rnp.recovery(model, run.batches))
    with clock("evaluate"):
        run.evaluate(run.model)
    one = clock.seconds
    count = epochs + recover_epochs + len(reference_rnp.THRESHOLDS)
    evaluations = count * one["evaluate"]
    return {
        "seconds": epochs * one["unlearn"] + recover_epochs * one["recover"] + evaluations,
        "evaluation_seconds": evaluations,
        "extrapolated": True,
        "measured": one,
        "measured_cpu": clock.cpu,
        "peak": peak_memory(),
    }


def oracle(points: list[Result], before: float) -> Result:
    """The point that a reader who sees the test set would choose.

    That is the lowest ASR at a fall of CA by at most `LARGEST_DROP`.
    """
    allowed = [point for point in points if before - point["clean_accuracy"] <= LARGEST_DROP]
    return min(allowed or points[:1], key=lambda point: point["attack_success_rate"])
