"""From data to scores with the commands of the README, on a few samples."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import DIST, SMALL, WITHOUT_PACKAGE, environment, run

SCRIPTS = Path(sys.executable).parent


def test_the_pipeline_leaves_models_scores_and_a_table(pipeline):
    folder, result = pipeline
    base = folder / "work_dirs" / "digits"
    metrics = json.loads((base / "metrics.json").read_text())
    assert set(metrics) == {"teacher", "linear", "hybrid"}
    for name in ("linear", "hybrid"):
        kept = metrics[name]["accuracy"] / metrics["teacher"]["accuracy"]
        assert metrics[name]["kept"] == pytest.approx(kept)
        rows = [json.loads(line) for line in (base / f"scores_{name}" / "rows.jsonl").read_text().splitlines()]
        assert len(rows) == metrics[name]["count"] == 24
        assert {"id", "question", "prompt", "prediction", "parsed", "gold", "correct", "category", "meta"} == set(rows[0])
    assert metrics["linear"]["cache_bytes"]["1024"] == metrics["linear"]["cache_bytes"]["65536"]
    assert metrics["hybrid"]["cache_bytes"]["65536"] < metrics["teacher"]["cache_bytes"]["65536"] / 3
    assert "held-out questions" in result.stdout


def test_repeating_the_pipeline_repeats_no_step(pipeline):
    folder, _ = pipeline
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")}
    command = ["bash", DIST, "pipeline", "projects/mmmamba/digits", 1, "--cfg-options", "train_cfg.max_iters=4", *SMALL]
    result = run(command, folder)
    assert result.returncode == 0
    assert result.stderr.count("done before") == 9
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")} == before


def test_a_pipeline_does_not_go_on_in_a_folder_made_with_other_options(pipeline):
    folder, _ = pipeline
    command = ["bash", DIST, "pipeline", "projects/mmmamba/digits", 1, "--cfg-options", "train_cfg.max_iters=5", *SMALL]
    result = run(command, folder)
    assert result.returncode == 2 and "choose another --work-dir" in result.stderr


def test_a_stage_refuses_a_later_stages_checkpoint_by_name(pipeline):
    folder, _ = pipeline
    wrong = folder / "work_dirs/digits/stage3_linear/iter_4.pth"
    options = ["--cfg-options", f"model.pretrained_pth={wrong}", *SMALL]
    command = [SCRIPTS / "xtuner-ext", "train", "mmmamba/digits/stage2", "--work-dir", folder / "wrong", *options]
    result = run(command, folder)
    assert result.returncode == 2
    assert f"checkpoint {wrong} comes from stage 3" in result.stderr


def test_a_run_does_not_go_on_from_another_configurations_checkpoint(pipeline):
    folder, _ = pipeline
    options = ["--cfg-options", "train_cfg.max_iters=8", "model.attention_layers=1,5", *SMALL]
    work_dir = folder / "work_dirs" / "digits" / "stage3_hybrid"
    command = [SCRIPTS / "xtuner-ext", "train", "mmmamba/digits/stage3_hybrid", "--work-dir", work_dir, *options]
    result = run(command, folder)
    assert result.returncode == 2 and "made with another layer_types" in result.stderr
    assert not (work_dir / "iter_8.pth").exists()


def test_stock_convert_and_chat_work_and_report_wrong_paths(pipeline):
    folder, _ = pipeline
    base = folder / "work_dirs" / "digits"
    config, out = "projects/mmmamba/digits/stage3_hybrid.py", folder / "hf"
    stock = SCRIPTS / "xtuner"
    result = run([stock, "convert", "pth_to_hf", config, base / "stage3_hybrid/iter_4.pth", out, "--fp32"], folder)
    assert result.returncode == 0, result.stderr
    assert (out / "xtuner_config.py").is_file() and (out / "model.safetensors").is_file()
    chat = [stock, "chat", out, "--prompt-template", "internlm2_chat"]
    result = run(chat, folder, input="Which is larger, 3 or 7?\n\nRESET\n\nWhat is 2 plus 2?\n\nEXIT\n\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("BOT: ") == 2 and "History responses have been removed" in result.stdout
    image = next((base / "data" / "images").glob("test-*.png"))
    result = run([stock, "chat", out, "--image", image], folder, input="Is there a 7?\n\nEXIT\n\n")
    assert result.returncode == 0 and "BOT: " in result.stdout
    one_shot = [SCRIPTS / "xtuner-ext", "chat", out, "--image", image, "--prompt", "Is there a 7?"]
    assert run(one_shot, folder).stdout.strip()
    assert run([stock, "chat", folder / "nowhere"], folder, input="").returncode != 0
    missing = run([stock, "convert", "pth_to_hf", config, folder / "no.pth", folder / "hf2"], folder)
    assert missing.returncode != 0 and not (folder / "hf2").exists()


def test_an_export_loads_without_this_package(pipeline):
    folder, _ = pipeline
    script = WITHOUT_PACKAGE + """
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
inputs = processor(processor.apply_chat_template([{"role": "user", "content": "Which is larger, 3 or 7?"}], tokenize=False))
assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "HybridVLForCausalLM"
"""
    out = folder / "work_dirs" / "digits" / "export_hybrid"
    result = run([sys.executable, "-c", script, out], folder, variables={"XTUNER_EXT": "0"})
    assert result.returncode == 0, result.stderr


def test_two_processes_train_and_pass_their_status_on(pipeline, tmp_path):
    folder, _ = pipeline
    options = ["--cfg-options", "train_cfg.max_iters=2", *SMALL]
    result = run(["bash", DIST, "train", "projects/mmmamba/digits/stage1.py", 2, "--work-dir", tmp_path / "two", *options], folder)
    assert result.returncode == 0, result.stderr[-3000:]
    failing = run(["bash", DIST, "train", "projects/mmmamba/digits/stage2.py", 2, "--work-dir", tmp_path / "a" / "stage2"], folder)
    assert failing.returncode != 0 and "train stage1 first" in failing.stderr


@pytest.mark.parametrize("stage", ["stage1", "stage3_hybrid"])
def test_a_killed_run_repeated_ends_in_the_same_weights(pipeline, tmp_path, stage):
    import torch

    from xtuner_ext.distill.stages import read_checkpoint

    folder, _ = pipeline
    options = ["train_cfg.max_iters=24", "default_hooks.checkpoint.interval=4", *SMALL]
    if stage != "stage1":
        options.append(f"model.pretrained_pth={folder}/work_dirs/digits/stage2/iter_4.pth")

    def command(work_dir):
        return ["bash", DIST, "train", f"projects/mmmamba/digits/{stage}.py", "1", "--work-dir", str(work_dir),
                "--cfg-options", *options]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(command(whole), folder).returncode == 0
    process = subprocess.Popen(
        command(cut), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (cut / "last_checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (cut / "iter_24.pth").exists()
    result = run(command(cut), folder)
    assert result.returncode == 0 and "resumed" in result.stdout + result.stderr
    expected, found = (read_checkpoint(str(path / "iter_24.pth"))[0] for path in (whole, cut))
    assert set(expected) == set(found)
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
