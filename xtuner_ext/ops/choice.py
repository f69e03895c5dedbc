"""Which of several implementations of one operation runs.

``auto`` takes the first kernel that is installed and agrees with the torch twin, ours before other packages', whose
first calls may search block sizes for a minute. ``tune`` checks and times them all and takes the fastest for every size
of call, which pays in long runs.

Every process checks and times for itself. Ranks of a distributed job that tunes may therefore choose differently,
which is harmless: no implementation communicates, and all agree with the twin up to rounding. Who needs the same bits
in every run names a backend or does not tune; where torch is asked for deterministic algorithms nothing is timed.
"""

import functools
import importlib
import importlib.util
import itertools
import logging
import os
import sys
import time
import types

import torch

logger = logging.getLogger(__name__)

# Share of the twin's norm by which a kernel's output or gradient may differ: bf16 products, no more. On an H200 the
# gradients of mamba-ssm's decay rates, sums with much cancellation, are 0.055 off.
TOLERANCE = 0.1
REPETITIONS = 3


class Kernel:
    """An implementation that needs a package.

    Args:
        call (Callable): Runs it; takes what the twin takes.
        package (str): What to install.
        module (str): What that installs.
    """

    def __init__(self, call, package, module):
        self.call, self.package, self.module = call, package, module

    @functools.cached_property
    def installed(self):
        """bool: Whether the package is there."""
        return find_package(self.module) is not None


class Backends:
    """The implementations of one operation.

    Args:
        operation (str): Its name in messages.
        twin (Callable): The one in plain torch, named ``torch``; it does everything everywhere.
        kernels (dict[str, Kernel]): The others by name, the preferred first. They run on CUDA.
        probe (Callable): Takes a function, a device, a dtype and a ``kind``, runs the function on a small input and
            returns its outputs and gradients by name.
        variable (str): Environment variable that says what ``auto`` is on CUDA, ``tune`` for instance.
    """

    def __init__(self, operation, twin, kernels, probe, variable):
        self.operation, self.twin, self.kernels, self.probe, self.variable = operation, twin, kernels, probe, variable
        self.names = ("auto", "tune", "torch", *kernels)
        self.faults, self.chosen = {}, {}

    def choose(self, wanted, x, kind, case, refusals, run):
        """Choose the implementation of a call.

        Args:
            wanted (str): A backend, ``auto`` or ``tune``; the latter two are torch off CUDA.
            x (Tensor): Gives device and dtype.
            kind (tuple): What beside these a kernel may stumble over; each is checked once.
            case (str): What else the time depends on, in words; each is timed once where times are taken.
            refusals (dict[str, str]): Why a kernel cannot do what this call asks, by name.
            run (Callable): Runs the call with a given implementation and leaves no trace; tunes and times it.

        Returns:
            Callable: What to call.

        Raises:
            ValueError: For an unknown backend, or a named one that cannot do what is asked or is not installed.
            RuntimeError: For a named one that fails its check.
        """
        if wanted in ("auto", "tune") and not x.is_cuda:
            # Kernels are CUDA's: a process that trains on a GPU still runs small things on the CPU.
            return self.twin
        if wanted == "auto":
            wanted = os.environ.get(self.variable) or "auto"
        if wanted not in self.names:
            raise ValueError(f"unknown {self.operation} backend {wanted!r}, expected one of {', '.join(self.names)}")
        if wanted == "torch":
            return self.twin
        key = (x.device, x.dtype, kind)
        if wanted not in ("auto", "tune"):
            return self._named(wanted, key, refusals, run)
        tunes = wanted == "tune" and not torch.are_deterministic_algorithms_enabled()
        name = self.chosen.get((key, case, tunes))
        if name is None or name in refusals:
            able = [name for name, kernel in self.kernels.items() if name not in refusals and kernel.installed]
            if recording(x.device):
                # Nothing may be run or timed now, so what passed its check before; not remembered.
                name = next((name for name in able if self.faults.get((name, key)) == ""), "torch")
            else:
                # Looked at one after the other, so that nothing is compiled behind the first that works.
                working = (name for name in able if not self._fault(name, key, run, warn=True))
                working = list(working if tunes else itertools.islice(working, 1))
                name = self.chosen[(key, case, tunes)] = self._fastest(working, x, case, run)
        return self.twin if name == "torch" else self.kernels[name].call

    def _named(self, name, key, refusals, run):
        kernel, what = self.kernels[name], f"{self.operation} backend {name!r}"
        if name in refusals:
            raise ValueError(f"{what} {refusals[name]}")
        if not kernel.installed:
            raise ValueError(f"{what} needs {kernel.package}, which is not installed")
        if not recording(key[0]) and (fault := self._fault(name, key, run)):
            raise RuntimeError(f"{what} cannot be used: {fault}")
        return kernel.call

    def _fastest(self, able, x, case, run):
        what = f"{self.operation} of {case} in {_word(x.dtype)} on {x.device}"
        if not able:
            packages = " or ".join(kernel.package for kernel in self.kernels.values())
            logger.info(f"{what}: torch (correct but slower; {packages} would bring a kernel)")
            return "torch"
        if len(able) == 1:
            logger.info(f"{what}: {able[0]}")
            return able[0]
        seconds = {}
        for name in able:
            try:
                seconds[name] = timed(functools.partial(run, self.kernels[name].call), x.device)
            except torch.OutOfMemoryError:
                logger.info(f"{what}: no memory is left to time {name}")
        best = min(seconds, key=seconds.get, default=able[0])
        logger.info(f"{what}: {best} ({', '.join(f'{name} {1e3 * time:.2f} ms' for name, time in seconds.items())})")
        return best

    def _fault(self, name, key, run, warn=False):
        """str: Why a kernel must not be used; empty where it agrees with the twin."""
        if (name, key) not in self.faults:
            fault = self.faults[(name, key)] = self._check(self.kernels[name].call, *key, run)
            if fault and warn:
                logger.warning(f"{self.operation} backend {name!r} is left out: {fault}")
        return self.faults[(name, key)]

    def _check(self, call, device, dtype, kind, run):
        where = f"on {device} in {_word(dtype)}"
        # Whatever someone else's kernel raises, on whatever machine: the twin can do its work.
        try:
            # The call's own size first: kernels remember what they tuned by widths alone, and what is best for the
            # probe's few tokens is not for many.
            run(call)
        except torch.OutOfMemoryError:
            logger.info(f"{self.operation} {where}: no memory is left to tune a kernel")
        except Exception as error:
            return _ended(where, error)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            expected = self.probe(self.twin, device, dtype, kind)
            try:
                found = self.probe(call, device, dtype, kind)
            except Exception as error:
                return _ended(where, error)
        for name, value in expected.items():
            error = difference(found[name], value)
            if not error <= TOLERANCE:
                return f"{where} its {name} differs from the torch twin's by {error:.2g} of their norm"
        return ""


def difference(found, expected):
    """float: Norm of the difference as a share of the expected one; nan where a number is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def timed(run, device):
    """float: Seconds of a call, the best of a few after one that compiles and tunes."""
    run()
    times = []
    for _ in range(REPETITIONS):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def run_detached(implementation, tensors, options, trains):
    """Run a call for its time alone: with its gradients where it trains, and without a trace in its graph.

    Args:
        implementation (Callable): Takes ``tensors`` and ``options`` by name; its first result is differentiated.
        tensors (dict[str, Tensor | None]): Tensors.
        options (dict): The rest.
        trains (bool): Whether gradients are asked for.
    """
    with torch.set_grad_enabled(trains):
        given = {name: t for name, t in tensors.items() if t is not None}
        copies = {name: t.detach().requires_grad_(t.requires_grad) for name, t in given.items()}
        result = implementation(**{**tensors, **copies}, **options)
        y = result[0] if isinstance(result, tuple) else result
        if trains:
            leaves = [t for t in copies.values() if t.requires_grad]
            torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)


def on_own_device(call):
    """A kernel written in Triton, launched on its first tensor's GPU and not on the current one."""

    @functools.wraps(call)
    def guarded(x, *args, **kwargs):
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return call(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return call(x, *args, **kwargs)

    return guarded


def recording(device):
    """bool: Whether a graph is being recorded, so that no result can be looked at."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def up_to(length):
    """int: The power of two that is not below a length."""
    return 1 << max(0, length - 1).bit_length()


def find_package(name):
    """ModuleSpec | None: Where a package lies; None also where it was blocked."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def import_part(package, module):
    """Import a module of a package whose own ``__init__`` may need CUDA extensions that were never built.

    Args:
        package (str): The package.
        module (str): Full name of the module in it.

    Returns:
        ModuleType: The module.

    Raises:
        ImportError: When the package is missing or the module itself cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        spec = find_package(package)
        if package in sys.modules or spec is None:
            raise
    bare = types.ModuleType(package)
    bare.__path__, bare.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules[package] = bare
    try:
        return importlib.import_module(module)
    except ImportError:
        del sys.modules[package]
        raise


def _ended(where, error):
    return f"{where} it ends in {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _word(dtype):
    return str(dtype).removeprefix("torch.")
