"""Memory that stays in the process, where the C library can be told so."""

import platform
import subprocess
import sys

import pytest
import torch

from xtuner_ext.cli import allocator

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# Page faults of taking and giving back 32 MiB a few times, after a first round.
COUNT = """
import resource, sys
from xtuner_ext.cli.allocator import keep_freed_memory

def take():
    block = b"x" * (32 * 2**20)

if sys.argv[1] == "keep":
    keep_freed_memory()
    keep_freed_memory()
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(word):
    result = subprocess.run([sys.executable, "-c", COUNT, word], capture_output=True, text=True, check=True)
    return int(result.stdout)


@glibc
def test_freed_memory_is_used_again_without_page_faults():
    kept, returned = page_faults("keep"), page_faults("return")
    # Huge pages, where the kernel gives them, are 2 MiB each.
    assert returned >= 5 * 32 // 2 and kept < returned / 10


@glibc
def test_training_goes_on_after_two_calls():
    allocator.keep_freed_memory()
    allocator.keep_freed_memory()
    torch.manual_seed(0)
    layer, losses = torch.nn.Linear(256, 256), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        loss = layer(torch.ones(4096, 256)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("library", ["", "musl"], ids=["unknown", "musl"])
def test_other_c_libraries_are_left_alone(monkeypatch, library):
    def refuse(name):
        raise AssertionError("a C library was opened")

    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", refuse)
    allocator.keep_freed_memory()
