"""Memory and time of a call."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

MIB = 2**20


def memory(key):
    """int: Bytes of this process in memory, ``VmRSS`` now or ``VmHWM`` at the most since :func:`forget_peak`."""
    # getrusage would begin with the peak of the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def forget_peak():
    """Let ``VmHWM`` begin at what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_growth(device, call):
    """int: Bytes by which a call's peak exceeds what was there before: the process's, or torch's on CUDA."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    forget_peak()
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before


def seconds(device, call):
    """float: Processor seconds of a call in all threads, or seconds on CUDA."""
    if device == "cuda":
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begun
    begun = time.process_time()
    call()
    return time.process_time() - begun


def in_fresh_process(script, *arguments):
    """object: What a script prints as JSON on its last line, from a process that has no freed memory to reuse.

    Blocks of 64 KiB and more go back to the kernel when they are freed, so a peak is what was needed at a time and
    not what the C library kept.

    Raises:
        SystemExit: When it fails, with its last words.
    """
    command = [sys.executable, script, *map(str, arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
