"""The import hook: what it costs, what it finds, how it is switched off."""

import subprocess
import sys
import types
import warnings
from importlib.metadata import files

import pytest

from xtuner_ext import autoload, compat


@pytest.fixture
def repaired_module(tmp_path, monkeypatch):
    """Name of an importable module that the table names; its repairs are what the test appends."""
    (tmp_path / "upstream_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(autoload.POST_IMPORT, "upstream_module", ("repair_upstream",))
    yield "upstream_module"
    sys.modules.pop("upstream_module", None)


def test_repair_runs_after_the_module_and_before_others_read_it(repaired_module, monkeypatch):
    monkeypatch.setattr(compat, "repair_upstream", lambda module: setattr(module, "value", 2), raising=False)
    from upstream_module import value

    assert value == 2


def test_repair_that_fails_warns_and_leaves_the_module(repaired_module, monkeypatch):
    monkeypatch.setattr(compat, "repair_upstream", lambda module: module.gone, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = __import__(repaired_module)
    assert module.value == 1
    assert "repair_upstream could not be applied to upstream_module" in str(caught[0].message)


def test_every_named_repair_exists():
    named = [name for names in autoload.POST_IMPORT.values() for name in names]
    assert all(callable(getattr(compat, name)) for name in [*named, *autoload.STAND_INS.values()])


def test_stand_in_is_used_only_for_a_missing_module(monkeypatch):
    package = types.ModuleType("deepspeed_package")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "deepspeed_package", package)
    monkeypatch.setitem(autoload.STAND_INS, "deepspeed_package.onebit", "fill_onebit_optimizers")
    monkeypatch.setitem(autoload.STAND_INS, "this", "fill_onebit_optimizers")
    from deepspeed_package.onebit import OnebitAdam

    with pytest.raises(RuntimeError, match="OnebitAdam"):
        OnebitAdam([], lr=1e-3)
    assert autoload.PostImportFinder().find_spec("this").origin.endswith("this.py")
    sys.modules.pop("deepspeed_package.onebit")


def test_install_twice_puts_one_finder():
    autoload.install()
    assert sum(isinstance(finder, autoload.PostImportFinder) for finder in sys.meta_path) == 1


def _import_times(statement, **environment):
    """Seconds of self time per module that one fresh interpreter imports."""
    output = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "OMP_NUM_THREADS": "1", **environment},
    ).stderr
    rows = [line.removeprefix("import time:").split("|") for line in output.splitlines() if "|" in line]
    return {name.strip(): int(own) * 1e-6 for own, _, name in rows if own.strip().isdigit()}


@pytest.fixture(scope="module")
def installed():
    """Skips unless the package is installed with its .pth file, as tools/setup.sh does."""
    try:
        found = any(str(file) == "xtuner_ext.pth" for file in files("xtuner_ext") or ())
    except ModuleNotFoundError:
        found = False
    if not found:
        pytest.skip("xtuner_ext is not installed in this environment")


def test_hook_is_cheap(installed):
    times = _import_times("import torch")
    ours = {name: seconds for name, seconds in times.items() if name.startswith("xtuner_ext")}
    assert {"xtuner_ext", "xtuner_ext.autoload", "xtuner_ext.compat"} == set(ours)
    assert not any(name.split(".")[0] in {"transformers", "xtuner", "mmengine"} for name in times)
    # About 4 ms where opening a file is slow; the bound leaves room for a busy machine.
    assert sum(ours.values()) < 0.02


def test_python_start_imports_nothing_heavy(installed):
    times = _import_times("pass")
    assert "xtuner_ext.autoload" in times
    assert not any(name.split(".")[0] in {"torch", "numpy", "importlib.metadata"} for name in times)
    assert "xtuner_ext.compat" not in times


def test_environment_variable_switches_it_off(installed):
    statement = "import sys; print([type(finder).__name__ for finder in sys.meta_path])"
    for value, expected in (("0", False), ("1", True)):
        output = subprocess.run(
            [sys.executable, "-c", statement], capture_output=True, text=True, env={"XTUNER_EXT": value}
        ).stdout
        assert ("PostImportFinder" in output) is expected
