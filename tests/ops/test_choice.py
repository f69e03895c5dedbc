"""How one of several implementations is chosen; tensors pretend to lie on a GPU."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from xtuner_ext.ops import choice
from xtuner_ext.ops.choice import Backends, Kernel, import_part

VARIABLE = "XTUNER_EXT_TEST_BACKEND"


def twin():
    return torch.ones(3)


def wrong():
    return torch.full((3,), 2.0)


def broken():
    raise RuntimeError("no kernel image\nfor this device")


def quick():
    return torch.ones(3) * 1.001


def slow():
    return torch.ones(3)


@pytest.fixture
def gpu(monkeypatch):
    """What a call gives on a GPU where every implementation takes the seconds that its name says."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(choice, "recording", lambda device: False)
    monkeypatch.setattr(choice, "timed", lambda run, device: run())
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=torch.float32)


def backends(*calls, module="torch"):
    probes = []

    def probe(call, device, dtype, kind):
        probes.append((call, kind))
        return {"y": call()}

    kernels = {call.__name__: Kernel(call, "a-package", module) for call in calls}
    made = Backends("op", twin, kernels, probe, VARIABLE)
    made.probes, made.runs = probes, []
    return made


def choose(made, x, wanted="tune", kind=(4,), case="small", refusals=None):
    def seconds(call):
        made.runs.append(call)
        return {"quick": 1.0, "slow": 2.0}.get(call.__name__)

    return made.choose(wanted, x, kind, case, refusals or {}, seconds)


def test_the_fastest_is_taken_and_remembered_by_case(gpu, caplog):
    made = backends(slow, quick)
    with caplog.at_level(logging.INFO):
        assert choose(made, gpu) is quick and choose(made, gpu) is quick
    # Each is tuned and timed, once.
    assert made.runs == [slow, quick] * 2
    assert "op of small in float32 on cuda:0: quick (slow 2000.00 ms, quick 1000.00 ms)" in caplog.text
    assert choose(made, gpu, case="large") is quick and made.runs[4:] == [slow, quick]
    # Both were checked, once each, beside the twin.
    assert [call for call, _ in made.probes] == [twin, slow, twin, quick]
    choose(made, gpu, kind=(8,))
    assert [kind for _, kind in made.probes[4:]] == [(8,)] * 4


@pytest.mark.parametrize(
    "kernel, reason",
    [
        (wrong, "its y differs from the torch twin's by 1 of their norm"),
        (broken, "it ends in RuntimeError: no kernel image"),
    ],
)
def test_a_kernel_that_fails_its_check_is_left_out_with_one_warning(kernel, reason, gpu, caplog):
    made = backends(kernel, slow)
    assert choose(made, gpu) is slow and choose(made, gpu, case="large") is slow
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"op backend '{kernel.__name__}' is left out: on cuda:0 in float32 {reason}"
    ]
    with pytest.raises(RuntimeError, match=reason):
        choose(made, gpu, kernel.__name__)


def test_without_a_kernel_that_works_torch_runs(gpu):
    assert choose(backends(wrong, broken), gpu) is twin
    assert choose(backends(quick, module="a_module_that_is_missing"), gpu) is twin
    assert choose(backends(quick), gpu, refusals={"quick": "cannot"}) is twin


def test_a_named_kernel_says_why_it_cannot_run(gpu):
    with pytest.raises(ValueError, match="op backend 'quick' cannot count"):
        choose(backends(quick), gpu, "quick", refusals={"quick": "cannot count"})
    with pytest.raises(ValueError, match="op backend 'quick' needs a-package, which is not installed"):
        choose(backends(quick, module="a_module_that_is_missing"), gpu, "quick")
    with pytest.raises(ValueError, match="unknown op backend 'fast', expected one of auto, tune, torch, quick"):
        choose(backends(quick), gpu, "fast")


def test_auto_takes_the_first_that_works_and_neither_runs_nor_times_the_others(gpu):
    made = backends(wrong, slow, quick)
    assert choose(made, gpu, "auto") is slow and choose(made, gpu, "auto", case="large") is slow
    assert made.runs == [wrong, slow] and quick not in [call for call, _ in made.probes]
    assert choose(made, gpu, "auto", refusals={"slow": "cannot"}) is quick
    # Measuring afterwards still measures them all.
    assert choose(made, gpu) is quick and choose(made, gpu, "auto", case="large") is slow


def test_the_environment_can_ask_for_measurement(gpu, monkeypatch):
    made = backends(slow, quick)
    assert choose(made, gpu, "auto") is slow
    monkeypatch.setenv(VARIABLE, "tune")
    assert choose(made, gpu, "auto") is quick
    cpu = SimpleNamespace(is_cuda=False, device=torch.device("cpu"), dtype=torch.float32)
    assert choose(made, cpu, "auto") is twin and choose(made, cpu, "tune") is twin


def test_the_environment_says_what_auto_is_on_a_gpu(gpu, monkeypatch):
    monkeypatch.setenv(VARIABLE, "slow")
    made = backends(slow, quick)
    assert choose(made, gpu, "auto") is slow and choose(made, gpu, "quick") is quick and made.runs == [slow, quick]
    cpu = SimpleNamespace(is_cuda=False, device=torch.device("cpu"), dtype=torch.float32)
    assert choose(made, cpu, "auto") is twin


def test_deterministic_algorithms_take_the_first_that_works(gpu):
    torch.use_deterministic_algorithms(True)
    try:
        made = backends(wrong, slow, quick)
        assert choose(made, gpu) is slow and made.runs == [wrong, slow]
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_runs_while_a_graph_is_recorded(gpu, monkeypatch):
    made = backends(slow, quick)
    monkeypatch.setattr(choice, "recording", lambda device: True)
    assert choose(made, gpu) is twin and not made.probes
    monkeypatch.setattr(choice, "recording", lambda device: False)
    assert choose(made, gpu) is quick
    monkeypatch.setattr(choice, "recording", lambda device: True)
    # What was chosen for this case, or for another one the first that passed its check.
    assert choose(made, gpu) is quick and choose(made, gpu, case="large") is slow


def test_a_kernel_without_memory_to_time_it_is_not_chosen(gpu):
    made = backends(slow, quick)

    def seconds(call):
        if call is quick:
            raise torch.OutOfMemoryError("full")
        return 1.0

    assert made.choose("tune", gpu, (4,), "small", {}, seconds) is slow


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Name of an importable package whose own import asks for an extension that was not built."""
    folder = tmp_path / "half_built"
    (folder / "ops").mkdir(parents=True)
    (folder / "__init__.py").write_text("import an_extension_that_was_not_built")
    (folder / "ops" / "__init__.py").write_text("")
    (folder / "ops" / "pure.py").write_text("answer = 42")
    (folder / "ops" / "needs.py").write_text("import an_extension_that_was_not_built")
    monkeypatch.syspath_prepend(tmp_path)
    yield "half_built"
    for name in [name for name in sys.modules if name.split(".")[0] == "half_built"]:
        del sys.modules[name]


def test_a_part_is_imported_although_the_package_is_not(package):
    assert import_part(package, f"{package}.ops.pure").answer == 42


def test_a_part_that_needs_the_extension_too_leaves_no_half_package(package):
    with pytest.raises(ImportError, match="an_extension_that_was_not_built"):
        import_part(package, f"{package}.ops.needs")
    assert package not in sys.modules
