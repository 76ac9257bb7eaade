"""What a plain restatement of a loop needs to be compared with ours step for step."""

import torch


def batches(data, size, rng):
    """Shuffled batches in the order in which `fit` draws them, in the memory layout that `Augment`
    leaves them in.
    """
    for positions in torch.randperm(len(data), generator=rng).split(size):
        torch.randint(
            0, 1, (2, len(positions)), generator=rng
        )  # an augmentation that shifts by nothing draws it all the same
        part = data.subset(positions)
        yield part.as_floats().contiguous(memory_format=torch.channels_last), part.labels
