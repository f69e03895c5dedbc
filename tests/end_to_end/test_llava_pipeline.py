"""XTuner's LLaVA commands as its guide writes them, on small models under the published names."""

import importlib.util
import json
import re
import shutil

import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from xtuner_ext.cli.main import run as xtuner_ext
from xtuner_ext.convert.small_llava import make_small_parts
from xtuner_ext.data.sources.photographs import PHOTOGRAPHS, make_photographs

from .conftest import run

PRETRAIN = "llava_internlm_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain"
FINETUNE = "llava_internlm_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
LLM, CLIP = "internlm/internlm-chat-7b", "openai/clip-vit-large-patch14-336"
SMALL = ["train_dataloader.batch_size=4", "train_dataloader.num_workers=0"]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def xtuner(folder, *words, **options):
    return run(["xtuner", *words], folder, **options)


def losses(work_dir):
    """Losses that a run logged, in order."""
    (log,) = work_dir.glob("*/vis_data/scalars.json")
    return [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder in which the published names are small local folders."""
    folder = tmp_path_factory.mktemp("llava")
    data = make_photographs(folder / "photographs", views=1, choices=2)
    parts = make_small_parts(folder / "parts", data, width=64)
    for name, source in ((LLM, parts / "llm"), (CLIP, parts / "clip")):
        (folder / name).parent.mkdir()
        (folder / name).symlink_to(source)
    root = folder / "data" / "llava_data"
    for stage, file in (("LLaVA-Pretrain", "blip_laion_cc_sbu_558k"), ("LLaVA-Instruct-150K", "llava_v1_5_mix665k")):
        (root / stage).mkdir(parents=True)
        shutil.copy(data / "llava.json", root / stage / f"{file}.json")
    for link in (root / "LLaVA-Pretrain" / "images", root / "llava_images"):
        link.symlink_to(data / "images")
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """Checkpoints of the guide's two trainings."""
    result = xtuner(place, "train", PRETRAIN, "--cfg-options", *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "no question is asked about it" in result.stderr  # there is no network for the guide's example picture
    (projector,) = (place / "work_dirs" / PRETRAIN).glob("iter_*.pth")
    options = [f"model.pretrained_pth={projector}", *SMALL]
    # Adapters of a layer that is not read have no gradient, which two processes have to agree upon.
    result = xtuner(place, "train", FINETUNE, "--cfg-options", *options, variables={"NPROC_PER_NODE": "2"})
    assert result.returncode == 0, result.stderr[-3000:]
    (adapters,) = (place / "work_dirs" / FINETUNE).glob("iter_*.pth")
    return projector, adapters


@pytest.fixture(scope="module")
def converted(place, trained):
    """Folders of the finetuned model by format, in fp32."""
    folders = {}
    # The config rounds the language model's weights to fp16, which readers of adapters do not.
    options = ("--fp32", "--cfg-options", "model.llm.torch_dtype=torch.float32")
    for kind in ("xtuner", "huggingface", "official"):
        folders[kind] = place / f"epoch_1_{kind}"
        assert convert(place, FINETUNE, trained[1], folders[kind], "--save-format", kind, *options) == 0
    return folders


def convert(place, config, checkpoint, out, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return xtuner_ext(["convert", "pth_to_hf", config, str(checkpoint), str(out), *options])


def refusal(place, capsys, *arguments):
    capsys.readouterr()
    assert convert(place, *arguments) == 2
    return capsys.readouterr().err


def test_xtuners_format_holds_what_was_trained(converted):
    names = {path.name for path in converted["xtuner"].iterdir()}
    assert names == {"llm_adapter", "visual_encoder_adapter", "projector", "xtuner_config.py"}
    assert (converted["xtuner"] / "llm_adapter" / "adapter_model.safetensors").is_file()


def test_a_pretrained_projector_is_converted_alone(place, trained):
    assert convert(place, PRETRAIN, trained[0], place / "projector_hf") == 0
    assert {path.name for path in (place / "projector_hf").iterdir()} == {"projector", "xtuner_config.py"}


def test_transformers_answers_from_its_format(place, converted):
    model = LlavaForConditionalGeneration.from_pretrained(converted["huggingface"])
    processor = AutoProcessor.from_pretrained(converted["huggingface"])
    assert processor.image_processor.do_pad  # as the finetuning data were
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
    text = processor.apply_chat_template(messages)
    assert text == "<|User|>:<image>\nWhat is in the picture?<eoh>\n<|Bot|>:"
    picture = Image.open(place / "photographs" / "images" / "coffee_0.png")
    batch = processor(images=picture, text=text, return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_index).sum() == 16
    assert model.generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2


def test_the_authors_layout(converted):
    from safetensors import safe_open

    raw = json.loads((converted["official"] / "config.json").read_text())
    assert (raw["model_type"], raw["mm_projector_type"], raw["mm_vision_select_layer"]) == ("llava", "mlp2x_gelu", -2)
    assert raw["rope_theta"] == 10000.0 and raw["unfreeze_mm_vision_tower"] and raw["image_aspect_ratio"] == "pad"
    with safe_open(converted["official"] / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias", "lm_head.weight"} <= keys
    assert "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding" in keys


def test_all_formats_give_the_same_logits(place, converted, monkeypatch):
    """The adapters' folder and the two whole ones are read by three ways of their own."""
    from xtuner_ext.convert import load_teacher
    from xtuner_ext.convert.export import probe_logits, relative_difference
    from xtuner_ext.convert.llava_parts import load_llava

    monkeypatch.chdir(place)
    parts, _ = load_llava(LLM, str(converted["xtuner"]), CLIP)
    whole = load_teacher(converted["official"], torch.float32)
    native = load_teacher(converted["huggingface"], torch.float32)
    # The rows of <image> and of padding are nobody's words.
    rows = parts.config.image_token_id
    logits = [probe_logits(model)[..., :rows] for model in (parts, whole)]
    assert relative_difference(*logits) < 1e-4
    native.config.vocab_size = whole.config.vocab_size
    assert relative_difference(logits[1], probe_logits(native)[..., :rows]) < 1e-5


def test_mistakes_are_named(place, trained, capsys):
    projector, adapters = trained
    out = place / "never"
    assert "does not exist" in refusal(place, capsys, FINETUNE, "nowhere.pth", out)
    message = refusal(place, capsys, FINETUNE, projector, out)
    assert "misses llm.base_model" in message and "another config made it" in message
    message = refusal(place, capsys, PRETRAIN, adapters, out)
    assert "which the config's model does not train" in message
    message = refusal(place, capsys, FINETUNE, adapters.parent, out)
    assert f"give one of its checkpoints, {adapters.name}" in message
    piece = place / "iter_1.pth" / "mp_rank_00_model_states.pt"
    piece.parent.mkdir()
    piece.touch()
    assert f"give the folder {piece.parent} instead" in refusal(place, capsys, FINETUNE, piece, out)
    (place / "full").mkdir()
    (place / "full" / "mine.txt").touch()
    assert "holds no earlier conversion" in refusal(place, capsys, FINETUNE, adapters, place / "full")
    assert not out.exists()


def test_a_quantised_language_model_is_refused_by_name(place, trained, capsys):
    folder = place / "quantised"
    shutil.copytree(place / LLM, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "awq"}}))
    option = f"model.llm.pretrained_model_name_or_path={folder}"
    for kind in ("huggingface", "official"):
        arguments = (trained[1], place / "never", "--save-format", kind, "--cfg-options", option)
        message = refusal(place, capsys, FINETUNE, *arguments)
        assert f"--save-format {kind} can not hold the language model {folder}, whose weights are quantised" in message


def test_an_internlm_is_written_as_the_llama_that_it_is(place, trained, capsys):
    folder = place / "as_published"
    shutil.copytree(place / LLM, folder)
    raw = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_internlm.X", "AutoModelForCausalLM": "modeling_internlm.X"}
    raw.update(model_type="internlm", bias=True, rotary={"base": 10000, "type": "dynamic"}, auto_map=code)
    (folder / "config.json").write_text(json.dumps({key: raw[key] for key in raw if key != "rope_parameters"}))
    options = ("--cfg-options", f"model.llm.pretrained_model_name_or_path={folder}")
    message = refusal(place, capsys, FINETUNE, trained[1], place / "never", "--save-format", "official", *options)
    assert "--save-format official can not hold InternLMForCausalLM, which has attention biases" in message
    assert not (place / "never").exists()
    out = place / "internlm_whole"
    assert convert(place, FINETUNE, trained[1], out, "--save-format", "huggingface", *options) == 0
    text = LlavaForConditionalGeneration.from_pretrained(out).config.text_config
    assert (text.model_type, text.attention_bias, text.rope_parameters["rope_type"]) == ("llama", True, "dynamic")
    assert "auto_map" not in (out / "config.json").read_text()


@pytest.fixture(scope="module")
def merged(place, converted):
    """Folders of language model and tower with their adapters merged."""
    out = {"llm": place / "merged_llm", "clip": place / "merged_clip"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        arguments = ["convert", "merge", LLM, str(converted["xtuner"] / "llm_adapter"), str(out["llm"])]
        assert xtuner_ext(arguments) == 0
        arguments = ["convert", "merge", CLIP, str(converted["xtuner"] / "visual_encoder_adapter"), str(out["clip"])]
        assert xtuner_ext([*arguments, "--is-clip"]) == 0
    return out


def test_merged_parts_are_the_parts(place, converted, merged, monkeypatch):
    from xtuner_ext.convert.export import probe_logits, relative_difference
    from xtuner_ext.convert.llava_parts import load_llava

    monkeypatch.chdir(place)
    whole, _ = load_llava(LLM, str(converted["xtuner"]), CLIP)
    bare = place / "projector_of_finetune"
    bare.mkdir()
    shutil.copytree(converted["xtuner"] / "projector", bare / "projector")
    merged, _ = load_llava(str(merged["llm"]), str(bare), str(merged["clip"]))
    assert relative_difference(probe_logits(whole), probe_logits(merged)) < 1e-4


# ---------------------------------------------------------------- one that learns, around a hybrid

STEPS = {"hybrid_pretrain": 40, "hybrid_finetune": 160}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Folder in which a hybrid's LLaVA was pretrained and finetuned, and its folder ``hf``."""
    folder = tmp_path_factory.mktemp("learnt")
    options = ["prepare_data.0.views=1", "prepare_data.0.choices=8", "train_dataloader.batch_size=8"]
    options += ["default_hooks.checkpoint.interval=100"]
    for stage, steps in STEPS.items():
        length = [f"train_cfg.max_iters={steps}", f"param_scheduler.1.end={steps}"]
        result = xtuner(folder, "train", f"llava/photographs/{stage}", "--cfg-options", *options, *length)
        assert result.returncode == 0, result.stderr[-3000:]
    checkpoint = f"work_dirs/llava_photographs/hybrid_finetune/iter_{STEPS['hybrid_finetune']}.pth"
    assert convert(folder, "llava/photographs/hybrid_finetune", checkpoint, folder / "hf") == 0
    whole = ("--save-format", "huggingface")
    assert convert(folder, "llava/photographs/hybrid_finetune", checkpoint, folder / "whole", *whole) == 0
    return folder


def test_both_stages_learn(learnt):
    runs = learnt / "work_dirs" / "llava_photographs"
    first, second = losses(runs / "hybrid_pretrain"), losses(runs / "hybrid_finetune")
    assert first[0] > 5 and first[-1] < 4.7
    assert second[-1] < 0.1


def test_a_hybrids_chat_answers_in_several_turns(learnt):
    data = "work_dirs/llava_photographs/data/images"
    command = ["chat", "hf", "--visual-encoder", "work_dirs/llava_photographs/parts/clip", "--llava", "hf"]
    command += ["--prompt-template", "internlm_chat", "--visual-select-layer", "-2", "--image", f"{data}/horse_0.png"]
    command += ["--max-new-tokens", "8"]
    questions = "What is in the picture?\n\nSay hello.\n\nRESET\n\nWhat do you see?\n\nEXIT\n\n"
    result = xtuner(learnt, *command, input=questions)
    assert result.returncode == 0, result.stderr[-2000:]
    answers = re.findall(r"BOT: (.*)", result.stdout)
    assert len(answers) == 3 and answers[0] == answers[2] == "a black horse"


def test_the_whole_folder_of_a_hybrid_needs_no_xtuner(learnt):
    model = AutoModelForCausalLM.from_pretrained(learnt / "whole", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(learnt / "whole")
    assert model.config.layer_types[-1] == "linear_attention"
    pictures = learnt / "work_dirs" / "llava_photographs" / "data" / "images"
    found = {}
    for name in PHOTOGRAPHS:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What do you see?"}]}]
        text = processor.apply_chat_template(messages, tokenize=False)
        batch = processor(text, images=[Image.open(pictures / f"{name}_0.png")])
        new = model.generate(**batch, max_new_tokens=12)[0, batch["input_ids"].shape[1] :]
        found[name] = processor.decode(new, skip_special_tokens=True)
    assert found == {name: thing for name, (thing, _) in PHOTOGRAPHS.items()}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_mmbench_scores_a_hybrid(learnt, split):
    table = f"work_dirs/llava_photographs/data/mmbench_{split}.tsv"
    command = ["mmbench", "hf", "--visual-encoder", "work_dirs/llava_photographs/parts/clip", "--llava", "hf"]
    command += ["--prompt-template", "internlm_chat", "--data-path", table, "--work-dir", f"out_{split}"]
    result = xtuner(learnt, *command, "--max-new-tokens", "4", "--visual-select-layer", "-2")
    assert result.returncode == 0, result.stderr[-2000:]
    (folder,) = (learnt / f"out_{split}").iterdir()
    rows = pd.read_excel(folder / "mmbench_result.xlsx")
    assert len(rows) == 4 * len(PHOTOGRAPHS) and set(rows["prediction"]) <= set("ABCD")
    if split == "test":
        assert not (folder / "mmbench_result.json").exists() and "Average" not in result.stdout
        return
    scores = json.loads((folder / "mmbench_result.json").read_text())
    right = rows["prediction"] == rows["answer"]
    groups = right.groupby(rows["index"] % 1_000_000).all()
    # A question counts where all of its circular forms were answered.
    assert scores["Average"] == pytest.approx(groups.mean())
    assert re.search(rf"Average\W+{100 * scores['Average']:.1f}", result.stdout)


def test_what_a_hybrid_can_not_be_written_as(learnt, capsys):
    checkpoint = f"work_dirs/llava_photographs/hybrid_finetune/iter_{STEPS['hybrid_finetune']}.pth"
    arguments = ("llava/photographs/hybrid_finetune", checkpoint, "never", "--save-format", "official")
    message = refusal(learnt, capsys, *arguments)
    assert "--save-format official can not hold the language model" in message and "Llama's attention alone" in message
    assert not (learnt / "never").exists()


# ---------------------------------------------------------------- DeepSpeed

needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="needs the package deepspeed")


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_resumes_and_is_converted(place, trained, stage, capsys):
    work_dir = place / f"zero{stage}"
    small = [*SMALL, f"model.pretrained_pth={trained[0]}"]
    command = ["train", FINETUNE, "--deepspeed", f"deepspeed_zero{stage}", "--work-dir", work_dir]
    result = xtuner(place, *command, "--cfg-options", *small, variables={"NPROC_PER_NODE": "2"})
    assert result.returncode == 0, result.stderr[-3000:]
    (checkpoint,) = work_dir.glob("iter_*.pth")
    assert convert(place, FINETUNE, checkpoint, place / f"zero{stage}_hf") == 0
    assert (place / f"zero{stage}_hf" / "llm_adapter").is_dir()
    capsys.readouterr()
    piece = next(checkpoint.glob("*mp_rank_00_model_states.pt"))
    assert f"give the folder {checkpoint} instead" in refusal(place, capsys, FINETUNE, piece, place / "never")
    options = [*small, "train_cfg.max_epochs=2"]
    result = xtuner(
        place, *command, "--resume", checkpoint, "--cfg-options", *options, variables={"NPROC_PER_NODE": "2"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    steps = int(checkpoint.stem.split("_")[1])
    assert (work_dir / f"iter_{2 * steps}.pth").is_dir()


@needs_deepspeed
def test_a_hybrid_trains_whole_with_its_weights_spread(learnt):
    """It also chats before the first iteration, when DeepSpeed has not seen who reads which weight."""
    options = ["prepare_data.0.views=1", "prepare_data.0.choices=2", "train_cfg.max_iters=4"]
    options += ["param_scheduler.1.end=12", "default_hooks.checkpoint.interval=4", "train_dataloader.batch_size=4"]
    work_dir = "work_dirs/llava_photographs/spread"
    command = ["train", "llava/photographs/hybrid_finetune", "--deepspeed", "deepspeed_zero3", "--work-dir", work_dir]
    result = xtuner(learnt, *command, "--cfg-options", *options, variables={"NPROC_PER_NODE": "2"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert convert(learnt, "llava/photographs/hybrid_finetune", f"{work_dir}/iter_4.pth", learnt / "spread_hf") == 0
