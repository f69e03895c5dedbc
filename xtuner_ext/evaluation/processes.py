"""The processes that share an evaluation."""

import contextlib
import dataclasses
import datetime
import os

import torch
import torch.distributed as dist

# A process may wait for the slowest one's last long answer.
PATIENCE = datetime.timedelta(days=7)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is.

    Attributes:
        rank (int): From 0.
        count (int): Processes.
    """

    rank: int = 0
    count: int = 1

    def wait(self):
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def processes():
    """Join the processes that torchrun started; there is one when it did not.

    Yields:
        Processes: This process among them; on a machine with GPUs each has its own.
    """
    count = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if count == 1 or dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # They say little to each other, and never anything that is on a GPU.
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
