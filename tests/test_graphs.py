"""Recorded training steps do what plain ones do; all of it needs a GPU."""

import copy

import pytest
import torch

from rnp.augment import Augment
from rnp.training import Train, cross_entropy, fit, graphable, one_cycle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIMISERS = {"sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}), "adamw": (torch.optim.AdamW, {"lr": 0.01})}


def train(model, data, rng, optimiser="sgd", objective=cross_entropy, **options):
    """Four epochs of five whole batches and a smaller one; the model and the history."""
    model = copy.deepcopy(model).cuda().train()
    kind, settings = OPTIMISERS[optimiser]
    history = fit(model, data, objective=objective(model), optimiser=graphable(kind, model, **settings), epochs=4, batch_size=8,
                  rng=rng(), augment=Augment(crop=1), schedule=lambda epoch: one_cycle(epoch / 4, 0.25), **options)
    return model, history


def assert_alike(one, other, *, rel=1e-3):
    (model, history), (same, again) = one, other
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, same.state_dict()[name], rtol=rel, atol=rel / 10)
    assert [row.loss for row in history] == pytest.approx([row.loss for row in again], rel=rel)
    assert [row.learning_rate for row in history] == [row.learning_rate for row in again]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_recorded_steps_do_what_plain_ones_do(optimiser, toy_model, toy_set, rng):
    data = toy_set(44)
    assert_alike(train(toy_model(), data, rng, optimiser), train(toy_model(), data, rng, optimiser, graphed=True))


@pytest.mark.filterwarnings("default")  # what a compiler says of itself
def test_compiled_steps_do_too(monkeypatch, toy_model, toy_set, rng):
    data = toy_set(44)
    plain = train(toy_model(), data, rng)
    monkeypatch.setattr("rnp.training.WORTH_COMPILING", 1)
    assert_alike(plain, train(toy_model(), data, rng, graphed=True), rel=0.1)  # other kernels, which round to TF32 or do not


def test_what_cannot_be_recorded_runs_as_it_is(toy_model, toy_set, rng):
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


def test_a_recipe_learns_there(toy_model, toy_set, rng):
    rows = []
    Train(epochs=8, batch_size=8)(toy_model().cuda(), toy_set(84), rng=rng(), on_epoch=rows.append)
    assert rows[-1].accuracy > 0.8
