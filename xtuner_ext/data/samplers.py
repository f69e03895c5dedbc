"""Endless sampling that continues at any position without reading what lies before."""

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from ..errors import UserError
from .lengths import sample_lengths


class ResumableInfiniteSampler(Sampler):
    """Shuffled passes over the dataset, one after another, without end.

    The order depends on the seed and the pass alone, so a resumed run skips to its place at once.

    Where the dataset has a ``mixture``, a pass is as many draws as there are samples: first of a group by its weight,
    then of a sample within the group, none of which comes again before all others have come.

    Args:
        dataset (Dataset): Anything with a length.
        shuffle (bool): Shuffle every pass.
        seed (int, optional): Agreed over the processes when absent.

    Raises:
        UserError: For a mixture that is not to be shuffled.
    """

    def __init__(self, dataset, shuffle=True, seed=None):
        self.rank, self.world_size = get_dist_info()
        self.size = len(dataset)
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.skipped = 0
        self.mixture = getattr(dataset, "mixture", None)
        if self.mixture is not None and not shuffle:
            raise UserError("the dataset is mixed by drawing, which shuffle=False does not allow: set mixing='repeat'")

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
        return self._shuffled(epoch, torch.Generator().manual_seed(self.seed + epoch)).tolist()

    def _shuffled(self, epoch, generator):
        order = torch.randperm(self.size, generator=generator)
        return order if self.mixture is None else torch.from_numpy(self._drawn(epoch))[order]

    def _drawn(self, epoch):
        groups, weights = self.mixture
        share = weights / weights.sum()
        # Only the numbers of all draws are needed to know where each group goes on.
        draws = [np.random.default_rng([self.seed, e]).multinomial(self.size, share) for e in range(epoch + 1)]
        before = sum(draws[:-1], np.zeros(len(groups), dtype=np.int64))
        parts = []
        for number, (group, start, count) in enumerate(zip(groups, before, draws[-1])):
            first, last = start // len(group), -(-(start + count) // len(group))
            passes = [np.random.default_rng([self.seed, number, p]).permutation(group) for p in range(first, last)]
            parts.append(np.concatenate([group[:0], *passes])[start - first * len(group) :][:count])
        return np.concatenate(parts)


class LengthGroupedSampler(ResumableInfiniteSampler):
    """Endless shuffled passes in which the samples of a batch are of like length, for those who do not pack.

    Every pass is cut into random groups of ``batches`` batches; a group is sorted by length, and the batches of
    all groups are shuffled. Where a pass does not end with a batch, the batch between two passes is mixed.

    Args:
        dataset (ConversationDataset): Samples.
        batch_size (int): The dataloader's, samples a process.
        batches (int): Batches among which samples are sorted; more make batches more alike and less random.
        seed (int, optional): Agreed over the processes when absent.
        cache_dir (str, optional): Folder that keeps the counted lengths, see
            :func:`~xtuner_ext.data.lengths.sample_lengths`.
        total_batch_size (int, optional): Samples of one optimizer step, which then are of like length whatever number
            of processes and iterations it takes; ``batch_size`` times the processes when absent.

    Raises:
        UserError: For a number below 1, or a dataset that does not tell the lengths of its samples.
    """

    def __init__(self, dataset, batch_size, batches=50, seed=None, cache_dir=None, total_batch_size=None):
        super().__init__(dataset, seed=seed)
        self.step = batch_size * self.world_size if total_batch_size is None else total_batch_size
        for name, value in (("batch_size", batch_size), ("batches", batches), ("total_batch_size", self.step)):
            if value < 1:
                raise UserError(f"LengthGroupedSampler.{name} is {value}, expected at least 1")
        # Processes take turns, so their batches of one step lie together.
        self.batches = batches
        self.lengths = torch.from_numpy(sample_lengths(dataset, cache_dir))

    def _order(self, epoch):
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = self._shuffled(epoch, generator)
        # The last step of the pass before still lacks these.
        begin = min(self.size, -epoch * self.size % self.step)
        whole = (self.size - begin) // self.step
        head, middle, tail = order.split([begin, whole * self.step, self.size - begin - whole * self.step])
        groups = middle.split(self.step * self.batches)
        steps = [part[self.lengths[part].argsort(stable=True)].view(-1, self.step) for part in groups if len(part)]
        if steps:
            steps = torch.cat(steps)
            middle = steps[torch.randperm(whole, generator=generator)].flatten()
        return torch.cat([head, middle, tail]).tolist()
