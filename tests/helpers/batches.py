"""Batches for plain restatements of a training loop, to compare them with `fit` step for step."""

import torch


def batches(data, size, rng):
    """Shuffled batches, in the order of `fit` and in the memory layout that `Augment` returns."""
    for positions in torch.randperm(len(data), generator=rng).split(size):
        # An augmentation that shifts by nothing draws its shifts all the same.
        torch.randint(0, 1, (2, len(positions)), generator=rng)
        batch = data.subset(positions)
        yield batch.as_floats().contiguous(memory_format=torch.channels_last), batch.labels
