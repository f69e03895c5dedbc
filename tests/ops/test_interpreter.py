"""Triton's kernels, interpreted on the CPU, against the torch twins: outputs and every gradient.

Packed rows, initial states and groups are in each; see ``interpreted`` for what is compared.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

NEEDS = {
    "step": ("triton",),
    "convolution step": ("triton",),
    "mamba_ssm": ("triton", "mamba_ssm"),
    "fla": ("triton", "fla"),
    "fla convolution": ("triton", "fla"),
}


def _case(name):
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    reason = f"{' and '.join(missing)} not installed"
    return pytest.param(name, id=name, marks=pytest.mark.skipif(bool(missing), reason=reason))


@pytest.mark.parametrize("name", [_case(name) for name in NEEDS])
def test_interpreted_kernels_equal_the_twins(name, repository):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(repository), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.interpreted", name], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert differences and all(error < 1e-5 for error in differences.values()), differences
