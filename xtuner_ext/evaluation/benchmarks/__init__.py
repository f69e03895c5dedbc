"""Benchmarks by name: ``get("pope").read(folder)``, then ``.join``, ``.mark``, ``.score`` and ``.submission``."""

from ...errors import UserError
from .base import Benchmark
from .caption import CAPTION
from .gqa import GQA
from .mmbench import CCBENCH, MMBENCH
from .mme import MME
from .mmvm import MMVM, MMVM_NUMBER
from .pope import POPE
from .refcoco import REFCOCO
from .scienceqa import SCIENCEQA
from .seed import SEED
from .vqa import CHARTQA, DOCVQA, INFOVQA, OKVQA, TEXTVQA, VIZWIZ, VQAV2

_ALL = (
    GQA,
    POPE,
    MME,
    MMBENCH,
    CCBENCH,
    SEED,
    SCIENCEQA,
    VQAV2,
    TEXTVQA,
    OKVQA,
    VIZWIZ,
    CHARTQA,
    DOCVQA,
    INFOVQA,
    CAPTION,
    REFCOCO,
    MMVM,
    MMVM_NUMBER,
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}

__all__ = ["BENCHMARKS", "Benchmark", "get"]


def get(name):
    """Find a benchmark.

    Args:
        name (str): One of :data:`BENCHMARKS`, in any case.

    Returns:
        Benchmark: The benchmark.

    Raises:
        UserError: For a name that there is not.
    """
    if (found := BENCHMARKS.get(name.lower())) is None:
        raise UserError(f"there is no benchmark {name!r}, expected one of {', '.join(BENCHMARKS)}")
    return found
