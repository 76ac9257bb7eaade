"""The training loop: it learns, is deterministic, stops when asked to, and reports a lost loss."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnp.errors import NonFiniteLossError, UserError
from rnp.neurons.masks import freeze_statistics
from rnp.training.augment import Augment
from rnp.training.loop import cross_entropy, fit, multi_step
from rnp.training.predict import accuracy, eval_batches, predict
from rnp.training.recipe import Train, one_cycle, progressive_size


def run(model, data, rng, *, lr=0.1, **options):
    options = {"epochs": 2, "batch_size": 8} | options
    return fit(
        model,
        data,
        objective=options.pop("objective", cross_entropy(model)),
        rng=rng,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        **options,
    )


def test_it_learns(toy_model, toy_set, rng):
    model = toy_model().train()
    test = toy_set(40, seed=9)
    before = accuracy(model, test)
    history = run(model, toy_set(80), rng(), lr=0.3, epochs=10)
    assert history[-1].loss < history[0].loss / 2 and history[-1].accuracy > 0.8
    assert accuracy(model, test) > max(0.8, before)


def test_train(toy_model, toy_set, rng):
    rows = []
    model = toy_model()
    returned = Train(epochs=6, batch_size=8)(model, toy_set(80), rng=rng(), on_epoch=rows.append)
    assert returned is model and not model.training and accuracy(model, toy_set(40, seed=9)) > 0.9
    assert [row.epoch for row in rows] == list(range(6))
    assert rows[-1].learning_rate < rows[2].learning_rate


@pytest.mark.parametrize("augment", [Augment(), Augment(crop=0, flip=False)])
def test_the_generator_decides_bit_for_bit(augment, toy_model, toy_set, rng):
    def weights(seed):
        model = toy_model().train()
        history = run(model, toy_set(40), rng(seed), augment=augment)
        return history, torch.cat([v.flatten().double() for v in model.state_dict().values()])

    history, first = weights(1)
    history_again, again = weights(1)
    _, other = weights(2)
    assert torch.equal(first, again) and history == history_again
    assert not torch.equal(first, other)


def test_every_image_once_per_epoch_in_new_order(toy_model, toy_set, rng):
    data = toy_set(20)
    pixels = []
    model = toy_model()
    learn = cross_entropy(model)

    def objective(images, labels):
        pixels.extend(images[:, 0, 0, 0].mul(255).round().int().tolist())
        return learn(images, labels)

    run(model, data, rng(), objective=objective)
    first = pixels[:20]
    second = pixels[20:]
    stored = data.images[:, 0, 0, 0].tolist()
    assert sorted(first) == sorted(second) == sorted(stored)
    assert first != second and first != stored


@pytest.mark.parametrize(
    "options, steps, rows",
    [
        ({}, 6, 2),  # 20 images in batches of 8: three steps per epoch
        ({"max_steps": 4}, 4, 2),
        ({"max_steps": 3}, 3, 1),
        ({"stop_step": lambda step: step == 2}, 2, 1),
        ({"stop_epoch": lambda epoch: epoch.epoch == 0}, 3, 1),
        ({"epochs": 1, "max_steps": 100}, 3, 1),
    ],
)
def test_where_it_ends(options, steps, rows, toy_model, toy_set, rng):
    finished_steps = []
    received = []
    history = run(
        toy_model().train(),
        toy_set(20),
        rng(),
        **options,
        after_step=lambda: finished_steps.append(1),
        on_epoch=received.append,
    )
    assert len(finished_steps) == steps == history[-1].step
    assert len(history) == rows and received == history


def test_history_counts_images_not_batches(toy_set, toy_model, rng):
    """With constant weights, loss and accuracy are those of the whole set."""
    model = toy_model()
    data = toy_set(20)
    row = run(model, data, rng(), lr=0.0, epochs=1)[0]
    logits = model(data.as_floats())
    assert row.loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert row.accuracy == pytest.approx((logits.argmax(1) == data.labels).float().mean().item())


def test_the_clip_acts_between_backward_and_step(toy_model, toy_set, rng):
    """If the gradient is longer, one step of plain SGD moves the weights by lr * max_grad_norm."""
    model = toy_model().train()
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    history = run(model, toy_set(20), rng(), lr=1.0, max_grad_norm=0.01, max_steps=1)
    after = nn.utils.parameters_to_vector(model.parameters())
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert history[0].gradient_norm > 0.01


def test_a_large_max_grad_norm_changes_nothing(toy_model, toy_set, rng):
    def weights(max_grad_norm):
        model = toy_model().train()
        run(model, toy_set(20), rng(), max_grad_norm=max_grad_norm)
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.allclose(weights(None), weights(1e9), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_is_raised_with_its_step(bad, toy_model, toy_set, rng):
    model = toy_model()
    learn = cross_entropy(model)
    rows = []

    def objective(images, labels):
        loss, logits = learn(images, labels)
        return loss * bad, logits

    with pytest.raises(NonFiniteLossError, match="at step 3") as caught:
        run(model, toy_set(20), rng(), objective=objective, on_epoch=rows.append)
    assert caught.value.step == 3 and rows == []


def test_the_schedule_is_a_factor_by_epochs_done(toy_model, toy_set, rng):
    epochs = []

    def schedule(epoch):
        epochs.append(epoch)
        return 0.5

    history = run(toy_model(), toy_set(16), rng(), schedule=schedule)
    assert epochs == [0, 0.5, 1, 1.5] and history[0].learning_rate == 0.05


def test_the_schedule_keeps_the_ratio_of_learning_rates(toy_model, toy_set, rng):
    """Of several parameter groups each has its own rate, a float or a tensor."""
    model = toy_model()
    optimizer = torch.optim.Adam(
        [
            {"params": [*model.fc.parameters()], "lr": 0.1},
            {"params": [*model.conv1.parameters()], "lr": torch.tensor(0.02)},
        ]
    )
    fit(
        model,
        toy_set(16),
        objective=cross_entropy(model),
        optimizer=optimizer,
        epochs=1,
        batch_size=8,
        rng=rng(),
        schedule=lambda epoch: 0.5,
    )
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([0.05, 0.01])


@pytest.mark.parametrize(
    "progress, factor", [(0, 0.04), (0.125, 0.52), (0.25, 1.0), (0.625, 0.5), (1.0, 0.0)]
)
def test_one_cycle(progress, factor):
    assert one_cycle(progress, 0.25) == pytest.approx(factor)


def test_one_cycle_without_warmup_decreases_at_once():
    assert one_cycle(0.0, 0.0) == 1.0 and one_cycle(0.5, 0.0) == 0.5


@pytest.mark.parametrize(
    "epoch, factor", [(0, 1), (9.99, 1), (10, 0.1), (19.5, 0.1), (20, 0.01), (99, 0.01)]
)
def test_multi_step(epoch, factor):
    assert multi_step((10, 20), 0.1)(epoch) == pytest.approx(factor)


@pytest.mark.parametrize("train", [True, False])
def test_predict_is_in_eval_mode_and_restores_the_mode(train, toy_model, toy_set, unchanged):
    model = unchanged(toy_model()).train(train)
    data = toy_set(8)
    logits = predict(model, data.images)
    assert model.training == train and not logits.requires_grad
    assert torch.allclose(logits, copy.deepcopy(model).eval()(data.as_floats()), atol=1e-6)
    assert torch.allclose(predict(model, data.as_floats()), logits, atol=1e-6), "floats or bytes"


def test_predict_leaves_frozen_layers_frozen(toy_model, toy_set):
    model = freeze_statistics(toy_model(), frozen=True)
    predict(model, toy_set(4).images)
    assert model.training and not model.bn1.training and not model.bn2.training


def test_batches_do_not_matter(toy_model, toy_set, monkeypatch):
    model = toy_model()
    data = toy_set(23)
    logits = predict(model, data.images)
    monkeypatch.setattr("rnp.training.predict.EVAL_BATCH", 5)
    assert torch.allclose(predict(model, data.images), logits, atol=1e-6)


def test_large_images_come_in_small_batches():
    assert [len(part) for part in eval_batches(torch.zeros(1001, 1, 2, 2))] == [500, 500, 1]
    assert [len(part) for part in eval_batches(torch.zeros(5, 1, 2048, 2048))] == [2, 2, 1]
    assert [len(part) for part in eval_batches(torch.zeros(2, 4, 2048, 2048))] == [1, 1]
    assert eval_batches(torch.zeros(0, 3, 8, 8))[0].shape == (0, 3, 8, 8)


def test_bf16_agrees_roughly(trained, toy_set):
    data = toy_set(40, seed=9)
    full, half = (predict(trained, data.images, precision=p) for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    assert torch.allclose(full, half, atol=0.05 * full.abs().max().item())
    assert abs(accuracy(trained, data, precision="bf16") - accuracy(trained, data)) <= 0.05


def test_bf16_trains(toy_model, toy_set, rng):
    model = toy_model().train()
    history = run(model, toy_set(80), rng(), epochs=6, precision="bf16")
    assert history[-1].loss < history[0].loss / 2 and model.fc.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        ("epochs", 0, "above 0"),
        ("batch_size", 0, "above 0"),
        ("lr", 0, "above 0"),
        ("lr", -1, "above 0"),
        ("warmup_fraction", 1, "in [0, 1)"),
        ("warmup_fraction", -0.1, "in [0, 1)"),
        ("resize_start", 0, "in (0, 1]"),
        ("resize_start", 1.1, "in (0, 1]"),
        ("resize_end", 1, "in [0, 1)"),
        ("resize_end", -0.1, "in [0, 1)"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError) as caught:
        Train(**{name: value})
    assert str(caught.value).startswith(f"train.{name} must be {bounds}, got {value:g}")


def test_progressive_resizing(toy_model, toy_set, rng):
    """From half their side to all of it, by the progress of the run."""
    data = toy_set(16, size=16)
    sides = []
    model = toy_model()
    model.conv1.register_forward_pre_hook(lambda module, inputs: sides.append(inputs[0].shape[-1]))
    Train(epochs=5, batch_size=8, resize_start=0.5, resize_end=0.8)(model, data, rng=rng())
    assert sides == [8, 8, 8, 8, 12, 12, 12, 12, 16, 16]


@pytest.mark.parametrize("progress, factor", [(0, 0.5), (0.4, 0.75), (0.8, 1), (1, 1)])
def test_progressive_size(progress, factor):
    assert progressive_size(progress, 0.5, 0.8) == factor
    assert progressive_size(progress, 0.5, 0) == 1


def test_train_with_adamw(toy_model, toy_set, rng):
    train = Train(optimizer="adamw", epochs=6, batch_size=8, lr=0.01)
    model = train(toy_model(), toy_set(80), rng=rng())
    assert accuracy(model, toy_set(40, seed=9)) > 0.9


def test_dropout_follows_the_seed_and_nothing_else(toy_model, toy_set, rng):
    """Layers draw from the global generator, which `fit` seeds and then restores."""

    def train(seed, before):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        model = nn.Sequential(toy_model(), nn.Dropout(0.5)).train()
        run(model, toy_set(32), rng(seed), epochs=1)
        assert torch.equal(torch.get_rng_state(), state)
        return model[0].fc.weight

    assert torch.equal(train(0, 5), train(0, 6)) and not torch.equal(train(0, 5), train(1, 5))


class Heads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.kind = kind

    def forward(self, x):
        logits = self.fc(x.mean((2, 3)))
        return {
            "tuple": (logits, logits),
            "dictionary": {"logits": logits},
            "map": logits[:, :, None, None],
            "vector": logits[:, 0],
        }[self.kind]


@pytest.mark.parametrize(
    "kind, words",
    [
        ("tuple", "for 6 images the model returns a tuple, not logits"),
        ("dictionary", "returns a dict, not"),
        ("map", r"a tensor of shape \[6, 4, 1, 1\], not logits of shape \[6, classes\]"),
        ("vector", r"of shape \[6\], not"),
    ],
)
def test_what_is_no_classifier_is_refused(kind, words, toy_set, rng):
    from rnp.unlearn import Unlearn

    with pytest.raises(UserError, match=words):
        predict(Heads(kind), toy_set(6).images)
    with pytest.raises(UserError, match="classifiers with one head"):
        Unlearn(epochs=1)(Heads(kind), toy_set(6), rng=rng())


def test_a_batch_too_small_for_batch_norm_is_refused(toy_set, rng):
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 4)
    ).train()
    with pytest.raises(UserError, match="of 17 images in batches of 8 one batch has a single"):
        run(model, toy_set(17), rng(), epochs=1)
