"""The features are the inputs of the last linear layer."""

import pytest
import torch
from torch import nn

from rnp.errors import UserError
from rnp.models.features import features, head


def test_the_head_turns_them_into_logits(toy_model, toy_set):
    model = toy_model()
    images = toy_set(6).as_floats().requires_grad_()
    inputs, logits = features(model, images)
    assert torch.allclose(head(model)(inputs), logits)
    assert torch.equal(model(images), logits)
    inputs.sum().backward()
    assert images.grad.abs().sum() > 0
    assert not model.fc._forward_pre_hooks


def test_a_network_without_a_linear_layer_is_refused():
    with pytest.raises(UserError, match="Sequential has no linear layer"):
        head(nn.Sequential(nn.Conv2d(3, 2, 1)))
