"""Endless sampling that continues at any position without reading what lies before."""

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler


class ResumableInfiniteSampler(Sampler):
    """Shuffled passes over the dataset, one after another, without end.

    The order depends on the seed and the pass alone, so a resumed run skips to its place at once.

    Args:
        dataset (Dataset): Anything with a length.
        shuffle (bool): Shuffle every pass.
        seed (int, optional): Agreed over the processes when absent.
    """

    def __init__(self, dataset, shuffle=True, seed=None):
        self.rank, self.world_size = get_dist_info()
        self.size = len(dataset)
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.skipped = 0

    def skip(self, samples):
        """Start at a later place.

        Args:
            samples (int): Samples that this process has already taken.
        """
        self.skipped = samples

    def __iter__(self):
        position = self.skipped * self.world_size + self.rank
        epoch, order = None, None
        while True:
            if position // self.size != epoch:
                epoch = position // self.size
                order = self._order(epoch)
            yield order[position % self.size]
            position += self.world_size

    def __len__(self):
        # Per process, as MMEngine's loop wants it for converting epochs to iterations.
        return -(-self.size // self.world_size)

    def _order(self, epoch):
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.size, generator=generator).tolist()
