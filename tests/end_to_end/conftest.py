"""A small project run: the shipped teacher, a handful of samples, a few iterations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIST = str(ROOT / "tools" / "dist.sh")
SMALL = ("prepare_data.train=96", "prepare_data.test=24", "train_dataloader.batch_size=4")

# Opens a script that has no xtuner_ext to import; run it with XTUNER_EXT=0.
WITHOUT_PACKAGE = """
import sys, importlib.abc
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "xtuner_ext":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
# A CPU torch beside the registry's torchvision lacks these; that is no matter of the export.
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def environment(**extra):
    """The tests' own interpreter first on PATH, one thread per process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **extra}


def run(command, cwd, variables=(), **options):
    """Run a command and return what it printed and its status."""
    words = [str(word) for word in command]
    env = environment(**dict(variables))
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, **options)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Folder in which the whole digits pipeline ran once, four iterations a stage."""
    folder = tmp_path_factory.mktemp("pipeline")
    command = ["bash", DIST, "pipeline", "projects/mmmamba/digits", 1, "--cfg-options", "train_cfg.max_iters=4", *SMALL]
    result = run(command, folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder, result
