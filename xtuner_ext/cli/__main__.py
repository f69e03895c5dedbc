"""python -m xtuner_ext.cli VERB ..."""

import sys

from xtuner_ext.cli.main import run

sys.exit(run())
