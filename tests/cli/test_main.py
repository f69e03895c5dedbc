"""The front door: verbs, help, statuses."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xtuner_ext.cli import config_names, configs_dir, main, versions
from xtuner_ext.cli.config_options import find_config
from xtuner_ext.errors import UserError


def test_help_lists_every_verb(capsys):
    assert main.run(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} ", output, re.M) for verb in [*main.OWN_VERBS, *main.STOCK_VERBS])


def test_version(capsys):
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == "xtuner_ext 0.1.0, xtuner 0.2.0\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "trian is not a verb; did you mean train?"),
        (["convert"], "convert was given alone, one of gguf_to_hf, merge, pth_to_hf, split must follow it"),
        (["convert", "pth_to"], "convert pth_to is not a verb; did you mean pth_to_hf?"),
        (["log-dataset", "no_such_config.py"], "config no_such_config.py is neither a file nor the name"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(argv, message, capsys):
    assert main.run(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("xtuner-ext: error: ") and message in error and error.count("\n") == 1


def test_statuses_of_exceptions(capsys, tmp_path):
    def raises(error):
        def entry(argv):
            raise error

        return entry

    assert main.run([], raises(KeyboardInterrupt())) == 130
    assert main.run([], lambda argv: open(tmp_path / "gone.json")) == 2
    assert "gone.json does not exist" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main.run([], raises(ZeroDivisionError()))


def test_message_is_that_of_the_mistake_itself(capsys):
    def entry(argv):
        try:
            raise UserError("row 3: 2 images were found, 1 was expected")
        except UserError as error:
            raise UserError(f"class `Dataset`: {error}") from error

    def worker(argv):
        raise UserError("Caught UserError in DataLoader worker 0.\nOriginal Traceback\nUserError: row 4")

    assert main.run([], entry) == main.run([], worker) == 2
    assert capsys.readouterr().err == (
        "xtuner-ext: error: row 3: 2 images were found, 1 was expected\nxtuner-ext: error: row 4\n"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("lines", [1, 100000], ids=["at the end", "in the middle"])
def test_a_reader_that_has_gone_ends_the_command_quietly(lines, unbuffered):
    """Its output is small enough to be written only at the end, or larger than any pipe."""
    code = (
        "import sys; from xtuner_ext.cli.main import run\n"
        "sys.stdin.read()\n"
        f"sys.exit(run([], lambda argv: [print('x' * 70) for _ in range({lines})] and 0))"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_help_into_head(scripts):
    command = f"'{scripts}/xtuner-ext' help | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    first, status = result.stdout.splitlines()
    # The help is short: it may be through before `head` leaves.
    assert first.startswith("usage: xtuner-ext VERB") and status in ("0", "141") and result.stderr == ""


def test_a_stock_tool_into_head(scripts):
    command = f"'{scripts}/xtuner-ext' list-cfg | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    first, status = result.stdout.splitlines()
    assert "CONFIGS" in first and status in ("0", "141") and result.stderr == ""


def test_another_broken_pipe_is_not_hidden():
    def entry(argv):
        raise BrokenPipeError("a worker died")

    with pytest.raises(BrokenPipeError, match="a worker died"):
        main.run([], entry)


@pytest.mark.parametrize("found", [None, "0.1.23"])
def test_wrong_xtuner_is_reported_with_the_command_that_mends_it(found, monkeypatch, capsys):
    monkeypatch.setattr(versions.metadata, "version", lambda name: found if name == "xtuner" else "5.20.0")
    monkeypatch.setattr(versions, "installed_version", lambda name: found)
    assert main.run(["list-cfg"]) == 2
    error = capsys.readouterr().err
    assert f"{sys.executable} -m pip install --no-deps --ignore-requires-python xtuner==0.2.0" in error


def test_setup_installs_the_accepted_xtuner(repository):
    pip_arguments = versions.ACCEPTED["xtuner"][2]
    assert f" {pip_arguments}\n" in (repository / "tools" / "setup.sh").read_text()


def test_every_stock_verb_is_in_the_table():
    import xtuner.entry_point as stock

    verbs = {
        verb if callable(value) else f"{verb} {word}"
        for verb, value in stock.modes.items()
        for word in ([""] if callable(value) else value)
        if not word.startswith("-")
    }
    assert verbs == set(main.STOCK_VERBS)
    root = Path(importlib.util.find_spec("xtuner").origin).parent
    assert all((root / file).is_file() for file, _ in main.STOCK_VERBS.values())


def test_several_processes_go_through_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main._torchrun_arguments([]) is None
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert "--nproc_per_node=2" in main._torchrun_arguments(["config.py"])
    assert main._torchrun_arguments(["config.py", "--launcher", "slurm"]) is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main._torchrun_arguments([]) is None
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("NNODES", "2")
    for name, value in (("NODE_RANK", "2"), ("MASTER_ADDR", "first"), ("PORT", "29500")):
        with pytest.raises(UserError, match=f"{name} is not set"):
            main._torchrun_arguments([])
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="NODE_RANK is 2, 0 to 1 is expected"):
        main._torchrun_arguments([])
    monkeypatch.setenv("NODE_RANK", "1")
    assert {"--nnodes=2", "--node_rank=1", "--master_addr=first"} <= set(main._torchrun_arguments([]))


def test_training_and_evaluation_are_shared(monkeypatch):
    calls = []
    monkeypatch.setattr(main, "_call", lambda command: calls.append(command[-3:]) or 0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert main.run(["train", "x.py"]) == main.run(["eval", "m"]) == 0
    assert calls == [["x.py", "--launcher", "pytorch"], ["-m", "xtuner_ext.cli.eval", "m"]]
    assert main.run(["eval", "--compare", "one"]) == 2 and len(calls) == 2


def test_status_of_a_child_is_passed_on():
    code = "import os, sys; os.kill(os.getpid(), 9) if sys.argv[1] == 'kill' else sys.exit(3)"
    assert main._call([sys.executable, "-c", code, "exit"]) == 3
    assert main._call([sys.executable, "-c", code, "kill"]) == 137


def test_configs_are_found_by_path_and_by_name(monkeypatch, tmp_path):
    names = config_names()
    if not names:
        pytest.skip("this checkout has no projects/")
    name, path = next(iter(names.items()))
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == find_config(f"projects/{name}.py") == path
    assert not any(part.startswith("_") for key in names for part in key.split("/"))
    assert Path(path).is_relative_to(configs_dir())
    with pytest.raises(UserError, match=re.escape(name)):
        find_config(f"projects/{name}x.py")


@pytest.mark.skipif(not Path(sys.executable).with_name("xtuner").exists(), reason="xtuner has no script here")
class TestStockCommand:
    def run(self, scripts, *argv, **environment):
        return subprocess.run(
            [scripts / "xtuner", *argv],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        )

    def test_list_cfg_lists_ours(self, scripts):
        result = self.run(scripts, "list-cfg", "-p", "mmmamba")
        assert result.returncode == 0
        ours = [name for name in config_names() if "mmmamba" in name]
        assert all(f"\n{name}\n" in result.stdout for name in ours)

    def test_wrong_path_makes_convert_fail(self, scripts):
        result = self.run(scripts, "convert", "pth_to_hf", "no_such_config.py", "x.pth", "y")
        assert result.returncode not in (0, None)
        assert "no_such_config.py" in result.stderr and "Traceback" not in result.stderr

    def test_status_of_a_stock_tool(self, scripts):
        assert self.run(scripts, "list-cfg", "--no-such-option").returncode == 2

    def test_switched_off(self, scripts):
        result = self.run(scripts, "no-such-verb", XTUNER_EXT="0")
        assert result.returncode == 0 and "xtuner-ext" not in result.stderr
