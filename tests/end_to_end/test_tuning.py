"""From data of all four kinds to a merged model with the README's commands, in small form."""

import json
import sys

import pytest
from mmengine.config import Config
from peft import PeftModel
from xtuner.registry import BUILDER

from xtuner_ext.cli.main import run as command
from xtuner_ext.convert.teacher import load_processor, load_teacher
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.template_fit import fit_template
from xtuner_ext.evaluation.runner import answer, read_questions

from .conftest import ROOT, WITHOUT_PACKAGE, run

CONFIG = str(ROOT / "projects" / "internvl" / "digits_lora.py")
FRAMES = ("min_frames=4", "max_frames=4", "sampling=middle")
NEW = ("three numbers", "photograph", "several pictures", "video")
ITERATIONS = 60


def score(model, meta, out):
    """Accuracy by category."""
    assert command(["eval", str(model), "--data", str(meta), "--out", str(out), "--frames", *FRAMES]) == 0
    return json.loads((out / "metrics.json").read_text())["by_category"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Folder with the data, a run, its adapter and the merged model."""
    folder = tmp_path_factory.mktemp("tuning")
    data, work_dir = folder / "data", folder / "run"
    assert command(["data", "make-kinds", str(data), "--train", "1200", "--test", "160"]) == 0
    options = [
        *(f"prepare_data.{key}={value}" for key, value in {"train": 1200, "test": 160, "out": data}.items()),
        f"train_dataloader.dataset.meta={data}/train.json",
        f"train_cfg.max_iters={ITERATIONS}",
        f"param_scheduler.1.end={ITERATIONS}",
    ]
    assert command(["train", CONFIG, "--work-dir", str(work_dir), "--cfg-options", *options]) == 0
    checkpoint = (work_dir / "last_checkpoint").read_text().strip()
    config = next(work_dir.glob("*.py"))
    assert command(["convert", "pth_to_hf", str(config), checkpoint, str(folder / "adapter")]) == 0
    assert command(["merge", str(work_dir), str(folder / "merged"), "--torch-dtype", "float32"]) == 0
    return folder


def test_the_check_finds_all_kinds_and_no_loss(tuned, tmp_path):
    report = tmp_path / "report.json"
    words = ["data", "check", str(tuned / "data" / "train.json"), "--model", "digits-teacher", "--json", str(report)]
    assert command([*words, "--frames", *FRAMES, "--jobs", "1"]) == 0
    assert not json.loads(report.read_text())["lost"]


def test_all_four_kinds_are_in_a_batch_and_no_sample_was_lost(tuned):
    config = Config.fromfile(next((tuned / "run").glob("*.py"))).train_dataloader
    dataset = BUILDER.build(config.dataset)
    samples = [dataset[index] for index in range(config.batch_size)]
    kinds = [dataset.record(index).kind for index in range(config.batch_size)]
    assert set(kinds) == {"text", "image", "images", "video"}
    assert {len(s["pixel_values"]) for s, kind in zip(samples, kinds) if kind == "images"} == {2, 3}
    assert {len(s["pixel_values"]) for s, kind in zip(samples, kinds) if kind == "video"} == {4}
    data = conversation_collate(samples)["data"]
    # Four vectors take the place of every tile.
    slots = (data["input_ids"] == dataset.processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum()
    assert slots == 4 * len(data["pixel_values"]) == 4 * sum(len(sample["pixel_values"]) for sample in samples)
    assert not (tuned / "run" / "bad_samples.jsonl").exists() or not (tuned / "run" / "bad_samples.jsonl").read_text()


def test_what_is_new_is_learnt_and_what_was_known_stays(tuned):
    test = tuned / "data" / "test.json"
    before, after = score("digits-teacher", test, tuned / "before"), score(tuned / "merged", test, tuned / "after")

    def share(scores, new):
        chosen = [entry for name, entry in scores.items() if (name in NEW) == new]
        return sum(entry["accuracy"] * entry["count"] for entry in chosen) / sum(entry["count"] for entry in chosen)

    assert share(before, new=True) < 0.25 and share(after, new=True) > 0.45
    assert before["video"]["accuracy"] < 0.3 and after["video"]["accuracy"] > 0.5
    assert share(before, new=False) > 0.9 and share(after, new=False) > 0.75


def test_the_merged_folder_answers_elsewhere_as_the_base_with_the_adapter_does_here(tuned, tmp_path):
    """There are no questions about video among these: frames are read by this package."""
    processor = load_processor("digits-teacher")
    template = fit_template("internlm2_chat", processor.tokenizer)
    questions = [q for q in read_questions(str(tuned / "data" / "test.json")) if q["video"] is None][:60]
    base = load_teacher("digits-teacher", dtype="float32")
    plain = [row["prediction"] for row in answer(base, processor, template, questions)]
    model = PeftModel.from_pretrained(base, tuned / "adapter").eval()
    rows = answer(model, processor, template, questions)
    inputs = {
        "prompts": [row["prompt"] for row in rows],
        "images": [[str(path) for path in question["images"]] for question in questions],
    }
    (tmp_path / "questions.json").write_text(json.dumps(inputs))
    script = WITHOUT_PACKAGE + """
import json
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
folder, questions, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
inputs, answers = json.load(open(questions)), []
for prompt, paths in zip(inputs["prompts"], inputs["images"]):
    batch = processor(prompt, images=[Image.open(path) for path in paths])
    ids = model.generate(**batch, max_new_tokens=32, do_sample=False)
    answers += processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
json.dump(answers, open(out, "w"))
"""
    words = [sys.executable, "-c", script, tuned / "merged", tmp_path / "questions.json", tmp_path / "answers.json"]
    result = run(words, tmp_path, variables={"XTUNER_EXT": "0", "HF_HOME": str(tmp_path / "hf")})
    assert result.returncode == 0, result.stderr
    elsewhere = json.loads((tmp_path / "answers.json").read_text())
    assert elsewhere == [row["prediction"] for row in rows] != plain and len(elsewhere) == 60
    assert not any("lora_" in key for key in load_teacher(tuned / "merged").state_dict())
