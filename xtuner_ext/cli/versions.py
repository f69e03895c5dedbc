"""Which versions of the packages we repair are accepted, and how to get them."""

import re
import sys
from importlib import metadata

from xtuner_ext.errors import UserError

XTUNER_VERSION = "0.2.0"

# Distribution -> (lowest accepted, first refused, arguments of pip install that give a right one).
ACCEPTED = {
    # Without its dependencies, since it pins older ones, and whatever the Python version, since it
    # stops at 3.12 in its metadata only.
    "xtuner": ("0.2.0", "0.2.1", f"--no-deps --ignore-requires-python xtuner=={XTUNER_VERSION}"),
    "mmengine": ("0.10.6", "0.11", "'mmengine>=0.10.6,<0.11'"),
    "transformers": ("5.17", "6", "'transformers>=5.17,<6'"),
}


def installed_version(name):
    """Returns the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_versions():
    """dict[str, str]: Versions of what decides a model's numbers, for the record beside scores."""
    names = ("xtuner_ext", "xtuner", "mmengine", "torch", "transformers", "tokenizers", "numpy", "pillow")
    return {name: found for name in names if (found := installed_version(name))}


def check_versions():
    """Raises UserError, with the command that mends it, if a package is missing or not accepted."""
    for name, (lowest, refused, pip_arguments) in ACCEPTED.items():
        found = installed_version(name)
        if found is not None and _numbers(lowest) <= _numbers(found) < _numbers(refused):
            continue
        state = "is not installed" if found is None else f"{found} is installed"
        raise UserError(
            f"{name} {state}, {lowest} or later and before {refused} is needed; "
            f"run: {sys.executable} -m pip install {pip_arguments}"
        )


def _numbers(version):
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
