"""Recorded training steps do what plain ones do: that needs a GPU. What cannot be recorded runs as
it is: that does not.
"""

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
def test_recorded_steps_do_what_plain_ones_do(optimizer, toy_model, toy_set, rng):
    data = toy_set(44)
    assert_alike(
        train(toy_model(), data, rng, optimizer),
        train(toy_model(), data, rng, optimizer, graphed=True),
    )


@needs_gpu
@pytest.mark.filterwarnings("default")  # what a compiler says of itself
def test_compiled_steps_do_too(monkeypatch, toy_model, toy_set, rng):
    data = toy_set(44)
    plain = train(toy_model(), data, rng)
    monkeypatch.setattr("rnp.training.loop.WORTH_COMPILING", 1)
    assert_alike(
        plain, train(toy_model(), data, rng, graphed=True), rel=0.1
    )  # other kernels, which round to TF32 or do not


@needs_gpu
def test_a_step_that_waits_cannot_be_recorded_and_runs_as_it_is(toy_model, toy_set, rng):
    def waiting(model):
        objective = cross_entropy(model)

        def decide(images, labels):
            loss, logits = objective(images, labels)
            return loss * (1.0 if loss.item() > -1 else 2.0), logits

        return decide

    data = toy_set(44)
    with pytest.warns(UserWarning, match="slower than it could be"):
        recorded = train(toy_model(), data, rng, objective=waiting, graphed=True)
    assert_alike(train(toy_model(), data, rng), recorded)


@needs_gpu
def test_a_recipe_learns_there(toy_model, toy_set, rng):
    rows = []
    Train(epochs=8, batch_size=8)(toy_model().cuda(), toy_set(84), rng=rng(), on_epoch=rows.append)
    assert rows[-1].accuracy > 0.8


@pytest.mark.parametrize("compiles, warned", [(False, 2), (True, 1)])
def test_what_fails_gives_way_to_plain_steps_and_no_step_is_taken_twice(
    compiles, warned, monkeypatch, recwarn
):
    taken = []

    def plain(images, labels):
        taken.append(len(images))
        return torch.zeros(()), images.flatten(1), torch.zeros(())

    def compiled(images, labels):
        raise RuntimeError("no compiler")

    def aside(self, images, labels):
        if self.compiled is plain:
            raise RuntimeError("no recorder")
        return self.compiled(images, labels)

    monkeypatch.setattr(CapturedStep, "_run_on_side_stream", aside)
    advance = CapturedStep(plain if compiles else compiled, plain, (4, 1, 2, 2))
    for n in (4, 4, 3, 4, 4):
        _, logits, _ = advance(torch.rand(n, 1, 2, 2), torch.zeros(n, dtype=torch.int64))
        assert len(logits) == n
    assert (
        taken == [4, 4, 3, 4, 4]
        and [str(each.message).partition(":")[0] for each in recwarn]
        == ["training is slower than it could be"] * warned
    )
