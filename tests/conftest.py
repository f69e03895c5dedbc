"""What all tests share."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from xtuner_ext import autoload  # noqa: E402

# Before any test imports torch or mmengine, also where the package is only on PYTHONPATH.
autoload.install()


@pytest.fixture(scope="session")
def repository():
    """Path of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def scripts():
    """Folder of the console scripts of the interpreter that runs the tests."""
    return Path(sys.executable).parent
