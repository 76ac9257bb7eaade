"""The device comes from the environment, the precision from a block or from the hardware."""

import contextvars

import pytest
import torch

from rnp.errors import UserError
from rnp.training.device import (
    autocast,
    chosen_precision,
    default_device,
    half_precision,
    use_precision,
)
from rnp.training.recipe import Train

CPU = torch.device("cpu")


def test_the_device_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("RNP_DEVICE", "cpu")
    assert default_device() == CPU
    monkeypatch.setenv("RNP_DEVICE", "toaster")
    message = "RNP_DEVICE='toaster' is no device of this machine; try cpu"
    with pytest.raises(UserError, match=message):
        default_device()


def test_the_default_precision_is_auto():
    """Outside of any block; the tests themselves run in one."""
    assert contextvars.Context().run(chosen_precision) == "auto"
    assert chosen_precision() == "fp32"


def test_blocks_of_precision_nest():
    with use_precision("bf16"):
        with use_precision("auto"):
            assert chosen_precision() == "auto"
        assert chosen_precision() == "bf16"
    assert chosen_precision() == "fp32"


def test_the_precision_is_restored_after_an_exception():
    with pytest.raises(RuntimeError, match="stop"), use_precision("bf16"):
        raise RuntimeError("stop")
    assert chosen_precision() == "fp32"


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_methods_compute_in_the_chosen_precision(precision, dtype, toy_model, toy_set, rng):
    dtypes = set()
    model = toy_model()
    model.conv2.register_forward_hook(lambda layer, inputs, output: dtypes.add(output.dtype))
    with use_precision(precision):
        Train(epochs=1, batch_size=8)(model, toy_set(16), rng=rng())
    assert dtypes == {dtype} and model.conv2.weight.dtype == torch.float32


def test_a_precision_by_name_does_not_depend_on_the_hardware():
    assert not half_precision("fp32", CPU) and half_precision("bf16", CPU)


@pytest.mark.parametrize(
    "native, limit, half",
    [(True, "", True), (True, "AVX512_CORE_BF16", True), (True, "avx2", False), (False, "", False)],
)
def test_auto_depends_on_the_processor_and_on_limits_of_onednn(native, limit, half, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert half_precision("auto", CPU) == half
    with autocast("auto", CPU):
        assert torch.is_autocast_enabled("cpu") == half
