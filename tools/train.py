"""python tools/train.py CONFIG [options of `xtuner-ext train`]"""

import sys
from pathlib import Path

# The repository instead of tools/, whose file names would hide those of other modules.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from xtuner_ext.cli import train  # noqa: E402
from xtuner_ext.cli.main import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(entry=train.main))
