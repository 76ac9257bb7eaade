"""Captured training steps equal plain ones (needs a GPU); others run as they are (needs none)."""

import copy

import pytest
import torch

from rnp.training.augment import Augment
from rnp.training.cuda_graphs import CapturedStep
from rnp.training.loop import cross_entropy, fit, make_optimizer
from rnp.training.recipe import Train, one_cycle

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


def train(model, data, rng, optimizer="sgd", objective=cross_entropy, **options):
    """Four epochs of five whole batches and a smaller one; the model and the history."""
    model = copy.deepcopy(model).cuda().train()
    kind, settings = OPTIMIZERS[optimizer]
    history = fit(
        model,
        data,
        objective=objective(model),
        optimizer=make_optimizer(kind, model, **settings),
        epochs=4,
        batch_size=8,
        rng=rng(),
        augment=Augment(crop=1),
        schedule=lambda epoch: one_cycle(epoch / 4, 0.25),
        **options,
    )
    return model, history


def assert_alike(one, other, *, rel=1e-3):
    (model, history), (same, again) = one, other
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, same.state_dict()[name], rtol=rel, atol=rel / 10)
    assert [row.loss for row in history] == pytest.approx([row.loss for row in again], rel=rel)
    assert [row.learning_rate for row in history] == [row.learning_rate for row in again]


@needs_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_captured_steps_equal_plain_ones(optimizer, toy_model, toy_set, rng):
    data = toy_set(44)
    assert_alike(
        train(toy_model(), data, rng, optimizer),
        train(toy_model(), data, rng, optimizer, cuda_graph=True),
    )


@needs_gpu
@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
def test_compiled_steps_equal_plain_ones(monkeypatch, toy_model, toy_set, rng):
    data = toy_set(44)
    plain = train(toy_model(), data, rng)
    monkeypatch.setattr("rnp.training.loop.WORTH_COMPILING", 1)
    # Other kernels may round to TF32.
    assert_alike(plain, train(toy_model(), data, rng, cuda_graph=True), rel=0.1)


@needs_gpu
def test_a_step_that_waits_for_values_is_not_captured(toy_model, toy_set, rng):
    def waiting(model):
        objective = cross_entropy(model)

        def decide(images, labels):
            loss, logits = objective(images, labels)
            return loss * (1.0 if loss.item() > -1 else 2.0), logits

        return decide

    data = toy_set(44)
    with pytest.warns(UserWarning, match="slower than it could be"):
        captured = train(toy_model(), data, rng, objective=waiting, cuda_graph=True)
    assert_alike(train(toy_model(), data, rng), captured)


@needs_gpu
def test_train_learns_on_a_gpu(toy_model, toy_set, rng):
    rows = []
    Train(epochs=8, batch_size=8)(toy_model().cuda(), toy_set(84), rng=rng(), on_epoch=rows.append)
    assert rows[-1].accuracy > 0.8


@pytest.mark.parametrize("compiles, warnings", [(False, 2), (True, 1)])
def test_failures_fall_back_to_plain_steps_and_no_step_runs_twice(
    compiles, warnings, monkeypatch, recwarn
):
    steps = []

    def plain(images, labels):
        steps.append(len(images))
        return torch.zeros(()), images.flatten(1), torch.zeros(())

    def compiled(images, labels):
        raise RuntimeError("no compiler")

    def run_on_side_stream(self, images, labels):
        if self.compiled is plain:
            raise RuntimeError("no capture")
        return self.compiled(images, labels)

    monkeypatch.setattr(CapturedStep, "_run_on_side_stream", run_on_side_stream)
    step = CapturedStep(plain if compiles else compiled, plain, (4, 1, 2, 2))
    for n in (4, 4, 3, 4, 4):
        _, logits, _ = step(torch.rand(n, 1, 2, 2), torch.zeros(n, dtype=torch.int64))
        assert len(logits) == n
    assert steps == [4, 4, 3, 4, 4]
    messages = [str(warning.message).partition(":")[0] for warning in recwarn]
    assert messages == ["training is slower than it could be"] * warnings
