"""Checkpoints are as large as `xtuner-ext estimate` says."""

import json
import sys
from pathlib import Path

import pytest

from .conftest import run


def test_checkpoints_have_the_estimated_size(pipeline):
    folder, _ = pipeline
    verb = [Path(sys.executable).parent / "xtuner-ext", "estimate"]
    report = json.loads(run([*verb, "projects/mmmamba/digits", "--length", "64", "--json"], folder).stdout)
    for name, stage in report.items():
        size = (folder / "work_dirs" / "digits" / name / "iter_4.pth").stat().st_size
        assert stage["checkpoint_bytes"] == pytest.approx(size, rel=0.02)
