"""Batch arithmetic: how many iterations make one optimizer step."""

import os

from ..errors import UserError


def accumulation(total, per_device, processes):
    """Iterations whose gradients make one optimizer step.

    Args:
        total (int): Samples (or packed rows) of one optimizer step, over all processes.
        per_device (int): Samples of one iteration in one process.
        processes (int): Training processes, one a GPU.

    Returns:
        int: ``total / (per_device * processes)``.

    Raises:
        UserError: Unless that is a whole number from 1 up.
    """
    for name, value in (("total_batch_size", total), ("batch_size", per_device), ("processes", processes)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} is {value!r}, expected a whole number from 1 up")
    at_once = per_device * processes
    if total % at_once:
        raise UserError(
            f"total_batch_size is {total}, which {per_device} samples a process x {processes} processes = {at_once} "
            "do not divide: change total_batch_size, train_dataloader.batch_size or the number of processes"
        )
    return total // at_once


def process_count(launcher="none"):
    """int: Training processes of this run, as its launcher announces them before they know of each other."""
    variable = {"slurm": "SLURM_NTASKS", "mpi": "OMPI_COMM_WORLD_SIZE"}.get(launcher, "WORLD_SIZE")
    return 1 if launcher == "none" else int(os.environ.get(variable) or 1)


def derived_options(config, processes):
    """Settings that follow from ``total_batch_size``, which a config states, and the number of processes.

    Args:
        config (Config): May hold ``total_batch_size``, and ``save_steps``, the optimizer steps between checkpoints. An
            ``optim_wrapper.accumulative_counts`` that is not None must agree.
        processes (int): Of the run.

    Returns:
        dict: Values by dotted key; empty for a config that states no total.

    Raises:
        UserError: When the total is no multiple of what the processes take at once, or a setting disagrees.
    """
    total = config.get("total_batch_size")
    if total is None:
        return {}
    count = accumulation(total, config.train_dataloader.batch_size, processes)
    stated = config.optim_wrapper.get("accumulative_counts")
    if stated not in (None, count):
        raise UserError(
            f"optim_wrapper.accumulative_counts is {stated}, but total_batch_size={total} makes it {count} with "
            f"{config.train_dataloader.batch_size} samples x {processes} processes: leave it None, or change the total"
        )
    options = {"optim_wrapper.accumulative_counts": count}
    if "total_batch_size" in config.train_dataloader.get("sampler", {}):
        options["train_dataloader.sampler.total_batch_size"] = total
    if config.get("save_steps") is not None:
        options["default_hooks.checkpoint.interval"] = config.save_steps * count
    return options
