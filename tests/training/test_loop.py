"""The one loop: it learns, repeats bit for bit, ends where it is told to, and says so when the
loss is lost.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnp.errors import NonFiniteLossError, UserError
from rnp.neurons.masks import freeze_statistics
from rnp.training.augment import Augment
from rnp.training.device import default_device, half_precision
from rnp.training.loop import cross_entropy, fit, multi_step
from rnp.training.predict import accuracy, eval_batches, predict
from rnp.training.recipe import Train, progressive_size, one_cycle


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
    model, test = toy_model().train(), toy_set(40, seed=9)
    before = accuracy(model, test)
    history = run(model, toy_set(80), rng(), lr=0.3, epochs=10)
    assert (
        history[-1].loss < history[0].loss / 2
        and history[-1].accuracy > 0.8
        and accuracy(model, test) > max(0.8, before)
    )


def test_train_is_a_recipe(toy_model, toy_set, rng):
    rows = []
    model = toy_model()
    returned = Train(epochs=6, batch_size=8)(model, toy_set(80), rng=rng(), on_epoch=rows.append)
    assert returned is model and not model.training and accuracy(model, toy_set(40, seed=9)) > 0.9
    assert [row.epoch for row in rows] == list(range(6)) and rows[-1].learning_rate < rows[
        2
    ].learning_rate


@pytest.mark.parametrize("augment", [Augment(), Augment(crop=0, flip=False)])
def test_the_generator_decides_bit_for_bit(augment, toy_model, toy_set, rng):
    def weights(seed):
        model = toy_model().train()
        history = run(model, toy_set(40), rng(seed), augment=augment)
        return history, torch.cat([v.flatten().double() for v in model.state_dict().values()])

    (history, one), (same_history, same), (_, other) = weights(1), weights(1), weights(2)
    assert torch.equal(one, same) and history == same_history and not torch.equal(one, other)


def test_every_image_once_per_epoch_in_new_order(toy_model, toy_set, rng):
    data, seen = toy_set(20), []
    model = toy_model()
    learn = cross_entropy(model)

    def objective(images, labels):
        seen.extend(images[:, 0, 0, 0].mul(255).round().int().tolist())
        return learn(images, labels)

    run(model, data, rng(), objective=objective)
    first, second, stored = seen[:20], seen[20:], data.images[:, 0, 0, 0].tolist()
    assert sorted(first) == sorted(second) == sorted(stored) and first != second and first != stored


@pytest.mark.parametrize(
    "options, steps, rows",
    [
        ({}, 6, 2),  # 20 images in batches of 8: three steps each epoch
        ({"max_steps": 4}, 4, 2),
        ({"max_steps": 3}, 3, 1),
        ({"stop_step": lambda step: step == 2}, 2, 1),
        ({"stop_epoch": lambda epoch: epoch.epoch == 0}, 3, 1),
        ({"epochs": 1, "max_steps": 100}, 3, 1),
    ],
)
def test_where_it_ends(options, steps, rows, toy_model, toy_set, rng):
    done, heard = [], []
    history = run(
        toy_model().train(),
        toy_set(20),
        rng(),
        **options,
        after_step=lambda: done.append(1),
        on_epoch=heard.append,
    )
    assert len(done) == steps == history[-1].step and len(history) == rows and heard == history


def test_history_counts_images_not_batches(toy_set, toy_model, rng):
    """With weights that stay put, loss and accuracy are those of the whole set, the last small
    batch included.
    """
    model, data = toy_model(), toy_set(20)
    row = run(model, data, rng(), lr=0.0, epochs=1)[0]
    logits = model(data.as_floats())
    assert row.loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert row.accuracy == pytest.approx((logits.argmax(1) == data.labels).float().mean().item())


def test_the_clip_acts_between_backward_and_step(toy_model, toy_set, rng):
    """One step of plain SGD moves the weights by exactly lr * clip_norm when the gradient is
    longer.
    """
    model = toy_model().train()
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    history = run(model, toy_set(20), rng(), lr=1.0, max_grad_norm=0.01, max_steps=1)
    after = nn.utils.parameters_to_vector(model.parameters())
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3) and history[
        0
    ].gradient_norm > 0.01


def test_a_wide_clip_changes_nothing(toy_model, toy_set, rng):
    def weights(clip_norm):
        model = toy_model().train()
        run(model, toy_set(20), rng(), max_grad_norm=clip_norm)
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.allclose(weights(None), weights(1e9), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_lost_loss_is_raised_with_its_step(bad, toy_model, toy_set, rng):
    model = toy_model()
    learn, rows = cross_entropy(model), []

    def objective(images, labels):
        loss, logits = learn(images, labels)
        return loss * bad, logits

    with pytest.raises(NonFiniteLossError, match="at step 3") as caught:
        run(model, toy_set(20), rng(), objective=objective, on_epoch=rows.append)
    assert caught.value.step == 3 and rows == []


def test_the_schedule_is_a_factor_by_epochs_done(toy_model, toy_set, rng):
    asked = []

    def schedule(epoch):
        asked.append(epoch)
        return 0.5

    history = run(toy_model(), toy_set(16), rng(), schedule=schedule)
    assert asked == [0, 0.5, 1, 1.5] and history[0].learning_rate == 0.05


@pytest.mark.parametrize(
    "done, factor", [(0, 0.04), (0.125, 0.52), (0.25, 1.0), (0.625, 0.5), (1.0, 0.0)]
)
def test_one_cycle(done, factor):
    assert one_cycle(done, 0.25) == pytest.approx(factor)


def test_one_cycle_without_warm_up_falls_at_once():
    assert one_cycle(0.0, 0.0) == 1.0 and one_cycle(0.5, 0.0) == 0.5


@pytest.mark.parametrize(
    "epoch, factor", [(0, 1), (9.99, 1), (10, 0.1), (19.5, 0.1), (20, 0.01), (99, 0.01)]
)
def test_multi_step(epoch, factor):
    assert multi_step((10, 20), 0.1)(epoch) == pytest.approx(factor)


@pytest.mark.parametrize("train", [True, False])
def test_predict_is_in_eval_mode_and_restores_the_mode(train, toy_model, toy_set, unchanged):
    model, data = unchanged(toy_model()).train(train), toy_set(8)
    logits = predict(model, data.images)
    assert model.training == train and not logits.requires_grad
    assert torch.allclose(logits, copy.deepcopy(model).eval()(data.as_floats()), atol=1e-6)
    assert torch.allclose(predict(model, data.as_floats()), logits, atol=1e-6), "floats or bytes"


def test_predict_leaves_frozen_layers_frozen(toy_model, toy_set):
    model = freeze_statistics(toy_model(), frozen=True)
    predict(model, toy_set(4).images)
    assert model.training and not model.bn1.training and not model.bn2.training


def test_batches_do_not_matter(toy_model, toy_set, monkeypatch):
    model, data = toy_model(), toy_set(23)
    whole = predict(model, data.images)
    monkeypatch.setattr("rnp.training.predict.EVAL_BATCH", 5)
    assert torch.allclose(predict(model, data.images), whole, atol=1e-6)


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


def test_precision_by_name():
    cpu = torch.device("cpu")
    assert not half_precision("fp32", cpu) and half_precision("bf16", cpu)


@pytest.mark.parametrize(
    "native, limit, half",
    [(True, "", True), (True, "AVX512_CORE_BF16", True), (True, "avx2", False), (False, "", False)],
)
def test_auto_is_what_processor_and_limit_allow(native, limit, half, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert half_precision("auto", torch.device("cpu")) == half


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0},
        {"lr": -1},
        {"warm_up": 1},
        {"warm_up": -0.1},
        {"grow_from": 0},
        {"grow_from": 1.1},
        {"grow_until": 1},
        {"grow_until": -0.1},
    ],
)
def test_impossible_settings_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=f"train.{name}"):
        Train(**options)


def test_the_device_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("RNP_DEVICE", "cpu")
    assert default_device() == torch.device("cpu")
    monkeypatch.setenv("RNP_DEVICE", "toaster")
    with pytest.raises(
        UserError, match="RNP_DEVICE='toaster' is no device of this machine; try cpu"
    ):
        default_device()


def test_images_grow_over_a_run(toy_model, toy_set, rng):
    """From half their side to all of it, by what was done of the run; the recipe of a run without
    growth is left alone.
    """
    data, seen = toy_set(16, size=16), []
    model = toy_model()
    model.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
    Train(epochs=5, batch_size=8, resize_start=0.5, resize_end=0.8)(model, data, rng=rng())
    assert seen == [8, 8, 8, 8, 12, 12, 12, 12, 16, 16]
    assert [progressive_size(done, 0.5, 0.8) for done in (0, 0.4, 0.8, 1)] == [
        0.5,
        0.75,
        1,
        1,
    ] and progressive_size(0, 0.5, 0) == 1


def test_adamw_is_a_recipe_too(toy_model, toy_set, rng):
    model = Train(optimizer="adamw", epochs=6, batch_size=8, lr=0.01)(
        toy_model(), toy_set(80), rng=rng()
    )
    assert accuracy(model, toy_set(40, seed=9)) > 0.9


def test_dropout_follows_the_seed_and_nothing_else(toy_model, toy_set, rng):
    """Layers draw from the global generator, which a fit sets and leaves as it was."""

    def train(seed, before):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        model = nn.Sequential(toy_model(), nn.Dropout(0.5)).train()
        run(model, toy_set(32), rng(seed), epochs=1)
        assert torch.equal(torch.get_rng_state(), state)
        return model[0].fc.weight

    assert torch.equal(train(0, 5), train(0, 6)) and not torch.equal(train(0, 5), train(1, 5))


class Heads(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.fc, self.answer = nn.Linear(3, 4), answer

    def forward(self, x):
        logits = self.fc(x.mean((2, 3)))
        return {
            "tuple": (logits, logits),
            "dictionary": {"logits": logits},
            "map": logits[:, :, None, None],
            "vector": logits[:, 0],
        }[self.answer]


@pytest.mark.parametrize(
    "answer, words",
    [
        ("tuple", "answers 6 images with a tuple, not with logits"),
        ("dictionary", "with a dict, not"),
        ("map", r"with a tensor of shape \[6, 4, 1, 1\], not with logits of shape \[6, classes\]"),
        ("vector", r"of shape \[6\], not"),
    ],
)
def test_what_is_no_classifier_is_refused(answer, words, toy_set, rng):
    from rnp.unlearn import Unlearn

    with pytest.raises(UserError, match=words):
        predict(Heads(answer), toy_set(6).images)
    with pytest.raises(UserError, match="classifiers with one head"):
        Unlearn(epochs=1)(Heads(answer), toy_set(6), rng=rng())


def test_a_batch_too_small_for_batch_norm_is_told(toy_set, rng):
    model = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 4)
    ).train()
    with pytest.raises(UserError, match="of 17 images in batches of 8 one is left alone"):
        run(model, toy_set(17), rng(), epochs=1)
