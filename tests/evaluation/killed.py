"""python tests/evaluation/killed.py VERB ...: `xtuner-ext`, killed after DIE batches; ASKED lists its questions."""

import os
import signal
import sys

from xtuner_ext import autoload

autoload.install()

from xtuner_ext.cli.main import run  # noqa: E402
from xtuner_ext.evaluation.resume import Partial  # noqa: E402
from xtuner_ext.evaluation.runner import Batches  # noqa: E402

answer, add, kept = Batches.answer, Partial.add, []


def answer_and_tell(self, number):
    """Answer a batch, and write down whose it is."""
    with open(os.environ["ASKED"], "a") as file:
        file.write("".join(f"{self.questions[i]['id']}\n" for i in self.members[number]))
    return answer(self, number)


def add_and_die(self, batch, predictions):
    """Keep a batch and, at the last one wanted, end without any warning."""
    add(self, batch, predictions)
    kept.append(batch)
    if len(kept) == int(os.environ.get("DIE", 0)):
        os.kill(os.getpid(), signal.SIGKILL)


Batches.answer, Partial.add = answer_and_tell, add_and_die
sys.exit(run())
