"""The front door of `xtuner-ext`, and of the stock `xtuner` where this package is installed.

xtuner-ext VERB [ARGUMENTS]
"""

import difflib
import importlib
import importlib.util
import logging
import os
import random
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import xtuner_ext
from xtuner_ext import autoload
from xtuner_ext.cli.config_options import find_config
from xtuner_ext.cli.versions import check_versions, installed_version
from xtuner_ext.errors import UserError

# Verb -> (module of this package with `main(argv) -> int | None`, help line).
OWN_VERBS = {
    "train": ("train", "train or distil with a config"),
    "chat": ("chat", "talk with a model, about an image if one is given"),
    "eval": ("eval", "score a model on a data set or a benchmark, or compare scores"),
    "compare": ("compare", "measure how much of a teacher its students keep"),
    "data": ("data", "make and check data sets"),
    "inspect": ("inspect", "say what a model folder holds and what its students would be"),
    "estimate": ("estimate", "count the memory, steps and tokens that a config needs"),
    "pipeline": ("pipeline", "run every stage of a project, from data to scores"),
    "select-layers": ("select_layers", "measure which layers should keep attention"),
    "cache-teacher": ("cache_teacher", "keep a teacher's likeliest next tokens for stage 3"),
    "convert pth_to_hf": ("convert", "turn a checkpoint into a Hugging Face folder"),
    "convert gguf_to_hf": ("convert", "unpack a GGUF file into a Hugging Face folder"),
    "merge": ("merge", "merge a tuned adapter into its base model"),
    "convert merge": ("convert", "merge an adapter into its base model"),
    "convert split": ("convert", "split a model into smaller shards"),
    "mmbench": ("mmbench", "score a LLaVA model on MMBench"),
}

# Verb -> (file under xtuner/, help line). Verbs that are also in the table above end up here when
# this package does not have the module.
STOCK_VERBS = {
    "train": ("tools/train.py", ""),
    "test": ("tools/test.py", "run the test loop of a config"),
    "chat": ("tools/chat.py", ""),
    "convert pth_to_hf": ("tools/model_converters/pth_to_hf.py", ""),
    "convert merge": ("tools/model_converters/merge.py", ""),
    "convert split": ("tools/model_converters/split.py", ""),
    "list-cfg": ("tools/list_cfg.py", "list the configs, ours included"),
    "copy-cfg": ("tools/copy_cfg.py", "copy a config to a folder"),
    "log-dataset": ("tools/log_dataset.py", "print a sample of a config's data set"),
    "check-custom-dataset": ("tools/check_custom_dataset.py", "check a config's text data set"),
    "list-dataset-format": ("tools/list_dataset_format.py", "list the data formats of xtuner"),
    "mmbench": ("tools/mmbench.py", ""),
    "eval_refcoco": ("tools/eval_refcoco.py", "score a LLaVA model on RefCOCO"),
    "preprocess arxiv": ("tools/data_preprocess/arxiv.py", "filter the arXiv dump"),
    "preprocess refcoco": ("tools/data_preprocess/convert_refcoco.py", "convert RefCOCO annotations"),
}

# Stock verbs whose first argument is a config, which we find in more places than they do
# (`copy-cfg` takes the name as it is).
CONFIG_FIRST = {"test", "log-dataset", "check-custom-dataset", "convert pth_to_hf", "copy-cfg"}

# Our verbs that several processes share, and what each of them is told then.
SHARED_VERBS = {"train": ("--launcher", "pytorch"), "eval": ()}
# Words that ask for what is not shared.
ALONE = {"--help", "-h", "--compare", "--rows"}

# What processes on several machines cannot do without.
NODE_VARIABLES = {
    "NODE_RANK": "each machine needs its own, from 0 to NNODES - 1",
    "MASTER_ADDR": "all machines need the address of the one with NODE_RANK=0",
    "PORT": "all machines need the same free port of the one with NODE_RANK=0",
}

HELP_WORDS = {"help", "-h", "--help"}
VERSION_WORDS = {"version", "-v", "--version"}

STDOUT = 1  # file descriptor


def run(argv=None, entry=None):
    """Runs a command and turns the user's mistakes into one line and a status.

    Args:
        argv (list[str], optional): The arguments. Defaults to those of the process.
        entry (Callable[[list[str]], int | None], optional): The command. Defaults to `main`.

    Returns:
        int: Exit status: 0, what the command returned, 2 for a user's mistake, 130 when interrupted, 141 when
        the reader of our output has gone, as `head` does.
    """
    # It warns, at every import, of kernels that it would download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        status = (entry or main)(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"xtuner-ext: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        if error.filename is None:
            raise
        print(f"xtuner-ext: error: {error.filename} does not exist", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 128 + signal.SIGPIPE


def _reader_has_gone():
    poll = select.poll()
    # Asked for nothing, it tells of errors alone.
    poll.register(STDOUT, 0)
    if not poll.poll(0):
        return False
    # Python flushes once more at its end, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return True


def main(argv):
    """Runs one verb, ours or xtuner's.

    Args:
        argv (list[str]): The verb and its arguments.

    Returns:
        int: Exit status of the verb.
    """
    autoload.install()
    if not argv or argv[0].lower() in HELP_WORDS:
        print(_help())
        return 0
    if argv[0].lower() in VERSION_WORDS:
        print(f"xtuner_ext {xtuner_ext.__version__}, xtuner {installed_version('xtuner') or 'not installed'}")
        return 0
    verb, arguments = _split_verb(argv)
    if verb is None:
        return 0
    check_versions()
    module = _own_module(verb)
    if module is None:
        return run_stock(verb, arguments)
    shared = verb in SHARED_VERBS and not ALONE.intersection(arguments)
    processes = _torchrun_arguments(arguments) if shared else None
    if processes is not None:
        return _call([*processes, "-m", module, *arguments, *SHARED_VERBS[verb]])
    # `convert` is one module for several verbs, so it is told which.
    words = verb.split()[1:]
    return importlib.import_module(module).main([*words, *arguments]) or 0


def _split_verb(argv):
    verbs = {**STOCK_VERBS, **OWN_VERBS}
    groups = {verb.split()[0] for verb in verbs if " " in verb}
    first = argv[0].lower()
    if first in verbs:
        return first, argv[1:]
    if first not in groups:
        raise UserError(f"{argv[0]} is not a verb{_close(first, {verb.split()[0] for verb in verbs})}")
    words = sorted(verb.split()[1] for verb in verbs if verb.startswith(first + " "))
    if len(argv) == 1:
        raise UserError(f"{first} was given alone, one of {', '.join(words)} must follow it")
    second = argv[1].lower()
    if second in HELP_WORDS:
        print("\n".join(_lines(verb for verb in verbs if verb.startswith(first + " "))))
        return None, []
    if second not in words:
        raise UserError(f"{first} {argv[1]} is not a verb{_close(second, words)}")
    return f"{first} {second}", argv[2:]


def _close(word, words):
    close = difflib.get_close_matches(word, sorted(words), n=2)
    return f"; did you mean {' or '.join(close)}?" if close else "; `xtuner-ext --help` lists the verbs"


def _own_module(verb):
    if verb not in OWN_VERBS:
        return None
    module = f"xtuner_ext.cli.{OWN_VERBS[verb][0]}"
    if importlib.util.find_spec(module) is not None:
        return module
    if verb in STOCK_VERBS:
        return None
    raise UserError(f"{verb} is not part of xtuner_ext {xtuner_ext.__version__}")


def run_stock(verb, arguments):
    """Runs the stock tool of a verb in a process of its own.

    Args:
        verb (str): One of `STOCK_VERBS`.
        arguments (list[str]): What follows the verb.

    Returns:
        int: Exit status of the tool.
    """
    arguments = list(arguments)
    if verb in CONFIG_FIRST and arguments and not arguments[0].startswith("-"):
        path = find_config(arguments[0])
        arguments[0] = arguments[0] if verb == "copy-cfg" else path
    file = Path(importlib.util.find_spec("xtuner").origin).parent / STOCK_VERBS[verb][0]
    processes = _torchrun_arguments(arguments)
    if processes is None:
        return _call([sys.executable, "-m", "xtuner_ext.cli.stock", str(file), *arguments])
    return _call([*processes, str(file), *arguments, "--launcher", "pytorch"])


def _torchrun_arguments(arguments):
    """Returns the command that starts several processes, or None where one is wanted or already started."""
    nodes, processes = _count("NNODES"), _count("NPROC_PER_NODE")
    pairs = list(zip(arguments, arguments[1:], strict=False))
    slurm = ("--launcher", "slurm") in pairs or "--launcher=slurm" in arguments
    # DeepSpeed wants a process group even for one process; where it is missing, `train` says so.
    deepspeed = any(word.startswith("--deepspeed") for word in arguments) and importlib.util.find_spec("deepspeed")
    alone = nodes == 1 and processes == 1 and not deepspeed
    if slurm or "LOCAL_RANK" in os.environ or alone:
        return None
    address, port = os.environ.get("MASTER_ADDR") or os.environ.get("ADDR"), os.environ.get("PORT")
    if nodes > 1:
        for name, value in (("NODE_RANK", os.environ.get("NODE_RANK")), ("MASTER_ADDR", address), ("PORT", port)):
            if not value:
                raise UserError(f"NNODES is {nodes} and {name} is not set: {NODE_VARIABLES[name]}")
        if _count("NODE_RANK", least=0) >= nodes:
            raise UserError(f"NODE_RANK is {os.environ['NODE_RANK']}, 0 to {nodes - 1} is expected")
    return [
        sys.executable,
        *("-m", "torch.distributed.run"),
        f"--nnodes={nodes}",
        f"--node_rank={os.environ.get('NODE_RANK', 0)}",
        f"--nproc_per_node={processes}",
        f"--master_addr={address or '127.0.0.1'}",
        f"--master_port={port or random.randint(20000, 29999)}",
    ]


def _count(variable, least=1):
    value = os.environ.get(variable) or str(least)
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{variable} is {value}, a number from {least} up is expected")
    return int(value)


def _call(command):
    status = subprocess.call(command)
    # A child that a signal ended has the negative signal number; shells report 128 plus it.
    return status if status >= 0 else 128 - status


def _sentence(error):
    """Returns the message of the mistake itself, without what libraries wrapped around it."""
    while isinstance(error.__cause__ or error.__context__, UserError):
        error = error.__cause__ or error.__context__
    text = str(error)
    # A DataLoader worker hands its traceback over inside the message.
    return re.split("(?:UserError|BadSample): ", text)[-1].strip() if "Original Traceback" in text else text


def _lines(verbs):
    for verb in verbs:
        text = OWN_VERBS[verb][1] if verb in OWN_VERBS else STOCK_VERBS[verb][1]
        yield f"  {verb:<22}{text}"


def _help():
    return "\n".join(
        [
            "usage: xtuner-ext VERB [ARGUMENTS]      (`xtuner VERB` does the same)",
            "",
            "Distils Transformer vision-language models into linear and hybrid Mamba-2 ones.",
            "",
            "verbs of xtuner_ext:",
            *_lines(OWN_VERBS),
            "",
            "verbs of xtuner:",
            *_lines(verb for verb in STOCK_VERBS if verb not in OWN_VERBS),
            "",
            "`xtuner-ext VERB --help` prints the arguments of a verb, `--version` the versions.",
            "NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR (or ADDR) and PORT start `train`, `test` and `eval` on "
            "several processes.",
        ]
    )
