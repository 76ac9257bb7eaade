"""Counted multiply-adds, in closed form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnp.training.work import Work, WorkCounter, count_pass

CONV = 8 * 3 * 3 * 3 * 16 * 16
"""Multiply-adds of 8 filters of 3x3 on 3 channels of 16x16 pixels."""
LINEAR = 8 * 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.fixture
def net():
    return Net().eval()


def test_a_forward_pass(net):
    assert count_pass(net, torch.zeros(4, 3, 16, 16, dtype=torch.uint8)) == CONV + LINEAR


def test_forward_and_backward_are_told_apart(net):
    """No gradient reaches the images, so the first layer's backward pass has its weights alone."""
    images = torch.rand(4, 3, 16, 16)
    with WorkCounter() as counter:
        F.cross_entropy(net(images), torch.zeros(4, dtype=torch.int64)).backward()
    assert counter.forward == 4 * (CONV + LINEAR)
    assert counter.backward == 4 * (CONV + 2 * LINEAR)
    work = counter.work(CONV + LINEAR)
    assert (work.forward_passes, work.backward_passes) == (4, 2)


def test_counting_changes_no_result(net):
    images = torch.rand(4, 3, 16, 16)
    plain = net(images)
    with WorkCounter():
        counted = net(images)
    assert torch.equal(plain, counted)


def test_what_is_outside_does_not_count(net):
    with WorkCounter() as counter:
        pass
    net(torch.rand(1, 3, 16, 16))
    assert counter.work(1) == Work(0, 0, 0, 0)


def test_a_sentence_for_people():
    assert str(Work(0, 0, 41_000, 9_000)) == "41,000 forward, 9,000 backward"
