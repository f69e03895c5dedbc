"""`merge` of adapters and runs, and `convert merge` with XTuner's own arguments."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.finetune.models import batch, build, internvl2, student  # noqa: F401
from xtuner_ext.cli.main import run
from xtuner_ext.convert.export import logits_difference
from xtuner_ext.modeling import HybridVLForCausalLM


@pytest.fixture
def adapter(build, student, tmp_path):  # noqa: F811
    model = build(student, lora=dict(language=dict(r=2)))
    model._write_adapter(str(student), tmp_path / "adapter", False)
    return model.llm.eval()


@pytest.fixture
def llama(tmp_path, write_text_model, digits):
    """A Llama folder with a tokenizer and an adapter of its language part, as XTuner's SupervisedFinetune writes it."""
    for name in ("base", "other"):
        model = write_text_model(tmp_path / name, "llama", vocab_size=512)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / file).write_bytes((digits / "tokenizer" / file).read_bytes())
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = get_peft_model(model, config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    return tuned


def test_an_adapters_folder(adapter, tmp_path, capsys):
    assert run(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    assert "logits differ by" in capsys.readouterr().out
    assert logits_difference(HybridVLForCausalLM.from_pretrained(tmp_path / "out").eval(), adapter) < 1e-5


def test_convert_merge_of_our_own_class(adapter, student, tmp_path):  # noqa: F811
    folders = [str(student), str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert run(["convert", "merge", *folders, "--safe-serialization", "--device", "cpu"]) == 0
    assert logits_difference(HybridVLForCausalLM.from_pretrained(tmp_path / "out").eval(), adapter) < 1e-5


def test_convert_merge_of_a_llama(llama, tmp_path):
    folders = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert run(["convert", "merge", *folders, "--max-shard-size", "20KB"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(merged).__name__ == "LlamaForCausalLM" and (tmp_path / "out" / "tokenizer.json").is_file()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    ids = torch.randint(0, 512, (1, 20))
    torch.testing.assert_close(merged(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)
    # Once more over its own output.
    assert run(["convert", "merge", *folders]) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convert_merge_of_a_llama_in_half_precision(llama, tmp_path, capsys, dtype):
    """The written model's logits are compared with the merged one's, both in that precision."""
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    assert run(["convert", "merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 0
    assert dtype in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


def test_a_folders_own_code_runs_only_where_it_is_allowed(llama, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    folders = [str(base), str(tmp_path / "adapter"), str(out)]
    lines = ["import pathlib", f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()"]
    lines += ["from transformers import PreTrainedTokenizerFast", "class Mine(PreTrainedTokenizerFast): pass"]
    (base / "tokenization_mine.py").write_text("\n".join(lines))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.update(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run(["convert", "merge", *folders]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(base) in message and "--trust-remote-code" in message
    assert not (tmp_path / "ran").exists() and not out.exists()
    assert run(["convert", "merge", *folders, "--trust-remote-code"]) == 0
    assert (tmp_path / "ran").exists() and out.is_dir()


def test_a_models_own_code_is_not_run_either(llama, tmp_path, capsys):
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    code = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**raw, "model_type": "mine", "auto_map": code}))
    assert run(["convert", "merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(tmp_path / "base") in message and "--trust-remote-code" in message
    assert not (tmp_path / "out").exists()


def test_convert_merge_of_a_vision_tower(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4
    )
    tower = CLIPVisionModel(config)
    tower.save_pretrained(tmp_path / "base")
    CLIPImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path / "base")
    options = LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    tuned = get_peft_model(tower, options).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    folders = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    assert run(["convert", "merge", *folders, "--is-clip"]) == 0
    merged = CLIPVisionModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(merged(pixels).last_hidden_state, tuned(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert CLIPImageProcessor.from_pretrained(tmp_path / "out").size["shortest_edge"] == 16
    assert run(["convert", "merge", *folders, "--is-clip"]) == 0


@pytest.mark.parametrize(
    "argv, message",
    [
        (["merge", "gone", "out"], "gone is not a folder"),
        (["merge", "empty", "out"], "empty holds neither adapter_config.json nor a training run"),
        (["merge", "adapter", "adapter/adapter_config.json"], "is a file, expected a folder to write"),
        (["merge", "adapter", "full"], "full is not empty and holds no earlier conversion"),
        (["convert", "merge", "gone", "adapter", "out"], "gone is not a folder"),
        (["convert", "merge", "base", "empty", "out"], "empty has no adapter_config.json"),
        (["convert", "merge", "other", "adapter", "out", "--is-clip"], "other does not hold the weights of a CLIPVisionModel"),
        (["convert", "merge", "own code", "adapter", "out"], "own code has no tokenizer that loads"),
        (["convert", "merge", "base", "adapter", "base"], "writing base would remove base, which is merged"),
        (["merge", "adapter", "adapter", "--base", "base"], "writing adapter would remove adapter, which is merged"),
        (["merge", "adapter", "out"], "adapter_config.json names gone, which does not exist, as its base model"),
        (["merge", "damaged", "out", "--base", "base"], "adapter_model.bin is not a readable file of weights"),
    ],
)
def test_mistakes(llama, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full", "own code"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "own code" / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoModel": "x.X"}}')
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name in ("adapter", "damaged"):
        (tmp_path / name).mkdir(exist_ok=True)
        gone = {**settings, "base_model_name_or_path": "gone"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(gone))
    (tmp_path / "damaged" / "adapter_model.bin").write_text("damaged")
    before = sorted(tmp_path.rglob("*"))
    assert run(argv) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["merge a b", "convert merge a b c", "convert pth_to_hf a b c"])
def test_the_size_of_a_file_has_a_unit(capsys, verb):
    with pytest.raises(SystemExit, match="2"):
        run([*verb.split(), "--max-shard-size", "2"])
    assert "2 is no size such as 500MB or 2GB" in capsys.readouterr().err


def test_chat_takes_an_adapter_that_was_tuned_beside_its_model(adapter, student, internvl2, tmp_path, capsys):  # noqa: F811
    ask = ["--prompt", "Which is larger?", "--max-new-tokens", "6"]
    assert run(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    answers = []
    for words in ([str(tmp_path / "merged")], [str(student), "--adapter", str(tmp_path / "adapter")], [str(student)]):
        assert run(["chat", *words, *ask]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    assert run(["chat", str(internvl2), "--adapter", str(tmp_path / "adapter"), *ask]) == 2
    assert "was trained beside other weights" in capsys.readouterr().err
