"""python tools/test.py CONFIG --checkpoint PTH [options of `xtuner test`]"""

import sys
from pathlib import Path

# The repository instead of tools/, whose file names would hide those of other modules.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from xtuner_ext.cli.main import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(["test", *sys.argv[1:]]))
