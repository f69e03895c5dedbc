"""Merged models that give the tuned ones' logits, or do not appear."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.end_to_end.conftest import WITHOUT_PACKAGE, run
from tests.finetune.models import batch, build, internvl2, student  # noqa: F401
from tests.reference.vision_language import write_internvl2
from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.checkpoint import read_state
from xtuner_ext.convert.export import logits_difference, probe_logits
from xtuner_ext.convert.merge import merge_adapter, merge_transformers, read_adapter
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.errors import UserError
from xtuner_ext.modeling import HybridVLForCausalLM

LORA = dict(language=dict(r=4), vision=dict(r=2), projector=dict(r=3))


@pytest.fixture
def tune(build, tmp_path):  # noqa: F811
    """Function that writes an adapter of a folder; returns the tuned model and the adapter's folder."""

    def tune(base, **options):
        model = build(base, **{"lora": LORA, **options}).eval()
        model._write_adapter(str(base), tmp_path / "adapter", False)
        return model.llm, tmp_path / "adapter"

    return tune


@pytest.fixture
def text_base(tmp_path, write_text_model, digits):
    """Function that writes a text model's folder with a tokenizer; returns transformers' model."""

    def write(family, **changes):
        model = write_text_model(tmp_path / "base", family, vocab_size=512, **changes)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "base" / name).write_bytes((digits / "tokenizer" / name).read_bytes())
        return model

    return write


def test_a_teacher_becomes_a_folder_of_ours(tune, internvl2, tmp_path):  # noqa: F811
    tuned, adapter = tune(internvl2, freeze=dict(embeddings=False))
    report = merge_adapter(adapter, tmp_path / "out")
    assert report["base"] == str(internvl2) and report["difference"] < 1e-5 and report["dtype"] == "float32"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert logits_difference(merged, tuned) < 1e-5
    assert logits_difference(merged, load_teacher(internvl2)) > 1e-2
    state = read_state(tmp_path / "out")
    assert set(state) == set(load_teacher(internvl2).state_dict()) and not any("lora_" in key for key in state)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "modeling.py", "processing.py", "tokenizer.json", "processor_config.json"} <= names
    assert {"chat_template.jinja", "generation_config.json", "README.md"} <= names
    assert load_processor(tmp_path / "out").settings == load_processor(internvl2).settings


def test_a_hybrid_student_with_tuned_mixers(tune, student, tmp_path):  # noqa: F811
    tuned, adapter = tune(student, lora=dict(language=dict(r=4), mixers=dict(r=2)), freeze=dict(projector=False))
    merge_adapter(adapter, tmp_path / "out")
    merged = HybridVLForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.config.layer_types == ["full_attention", "linear_attention"]
    assert logits_difference(merged, tuned) < 1e-5
    # Decays are no adapter's and stay what they were.
    mixers = [model.model.layers[1].mixer for model in (merged, load_teacher(student))]
    assert torch.equal(mixers[0].A_log, mixers[1].A_log)


def test_the_merged_model_answers_the_same_without_this_package(tune, student, tmp_path):  # noqa: F811
    tuned, adapter = tune(student)
    merge_adapter(adapter, tmp_path / "out")
    script = WITHOUT_PACKAGE + """
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
inputs = dict(processor("<image> Is there a 7?", images=[Image.new("RGB", (40, 30), "red")]))
answer = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
torch.save((inputs, model(**inputs).logits, answer), sys.argv[2])
"""
    variables = {"XTUNER_EXT": "0", "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run([sys.executable, "-c", script, tmp_path / "out", tmp_path / "x.pt"], tmp_path, variables=variables)
    assert result.returncode == 0, result.stderr
    inputs, logits, answer = torch.load(tmp_path / "x.pt")
    torch.testing.assert_close(tuned(**inputs).logits, logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(tuned.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None), answer)


@pytest.mark.parametrize("family", ["internlm2", "qwen2"])
def test_the_original_layout(tune, digits, tmp_path, family):
    base = tmp_path / "base"
    base.mkdir()
    # The tower's last layer is not read.
    write_internvl2(base, str(digits / "tokenizer"), family, select_layer=-2)
    (base / "modeling_internvl_chat.py").write_text("# the authors' code\n")
    tuned, adapter = tune(base)
    merge_adapter(adapter, tmp_path / "out", layout="original")
    assert logits_difference(load_teacher(tmp_path / "out"), tuned) < 1e-5
    before, after = read_state(base), read_state(tmp_path / "out")
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert any("layers.2." in key for key in same) and "mlp1.0.weight" in same
    assert not any("qkv.weight" in key and "layers.2." not in key for key in same)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_our_own_layout_is_no_original_one(tune, student, tmp_path):  # noqa: F811
    _, adapter = tune(student)
    with pytest.raises(UserError, match="is in the hybrid_vl layout"):
        merge_adapter(adapter, tmp_path / "out", layout="original")


def test_a_head_that_is_the_embedding(build, tmp_path, text_base):  # noqa: F811
    text_base("llama", tie_word_embeddings=True)
    base = tmp_path / "base"
    model = build(base, lora=dict(language=dict(r=2)), freeze=dict(embeddings=False, head=False)).eval()
    model._write_adapter(str(base), tmp_path / "adapter", False)
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    merged = HybridVLForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert logits_difference(merged, model.llm) < 1e-5


def test_bf16_is_checked_too(tune, student, tmp_path):  # noqa: F811
    tuned, adapter = tune(student)
    assert merge_adapter(adapter, tmp_path / "out", dtype="bfloat16")["dtype"] == "bfloat16"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16 and merged.model.layers[1].mixer.A_log.dtype == torch.float32
    assert logits_difference(tuned, merged.float().eval()) < 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers(tune, student, tmp_path, bits):  # noqa: F811
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    tuned, adapter = tune(student, quantization=dict(bits=bits))
    expected = probe_logits(tuned)
    found = {}
    for dequantise in (False, True):
        merge_adapter(adapter, tmp_path / f"out{dequantise}", dequantise=dequantise)
        merged = HybridVLForCausalLM.from_pretrained(tmp_path / f"out{dequantise}").eval()
        found[dequantise] = ((probe_logits(merged) - expected).abs().max() / expected.abs().max()).item()
    # Dequantised it is the model that was trained; 8-bit layers round their inputs besides.
    assert found[True] < (1e-4 if bits == 4 else 0.1) and found[False] > 1e-2


# ---------------------------------------------------------------- mistakes


def refused(adapter, out, message, **options):
    with pytest.raises(UserError, match=message) as error:
        merge_adapter(adapter, out, **options)
    assert "\n" not in str(error.value) and not out.exists()


def rewrite(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_empty_adapter_is_refused(tune, student, tmp_path):  # noqa: F811
    _, adapter = tune(student)
    weights = adapter / "adapter_model.safetensors"
    state = load_file(weights)
    rewrite(adapter, r=0)
    refused(adapter, tmp_path / "out", r"the ranks are \[0, .*there is nothing to merge")
    rewrite(adapter, r=4)
    save_file({"x": torch.zeros(1)}, weights)
    refused(adapter, tmp_path / "out", "holds no LoRA weight")
    weights.unlink()
    refused(adapter, tmp_path / "out", "has neither adapter_model.safetensors nor adapter_model.bin")
    weights.write_bytes(b"broken")
    refused(adapter, tmp_path / "out", "is not a readable safetensors file")
    save_file(state, weights)
    rewrite(adapter, peft_type="IA3")
    refused(adapter, tmp_path / "out", "peft_type is 'IA3', only LORA")
    refused(student, tmp_path / "out", "has no adapter_config.json")


def test_another_base_is_refused(tune, student, internvl2, tmp_path):  # noqa: F811
    _, adapter = tune(internvl2, lora=dict(language=dict(r=2)))
    # Of the same shapes, even of the same names where the student has mixers of Mamba-2.
    refused(adapter, tmp_path / "out", "was trained beside other weights than those of", base=str(student))
    (adapter / "base_model.json").unlink()
    refused(adapter, tmp_path / "out", "belongs to another model: .* has shape", base="digits-teacher")


def test_surplus_and_missing_weights_are_named(tune, student, tmp_path):  # noqa: F811
    _, adapter = tune(student)
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    name = next(iter(sorted(state)))
    save_file({key: value for key, value in state.items() if key != name}, path)
    refused(adapter, tmp_path / "out", f"it misses {name}")
    save_file({**state, "base_model.model.extra.lora_A.weight": torch.zeros(2, 2)}, path)
    refused(adapter, tmp_path / "out", "it has base_model.model.extra.lora_A.weight, which the base model has no layer")


def test_nothing_to_dequantise(tune, student, tmp_path):  # noqa: F811
    _, adapter = tune(student)
    refused(adapter, tmp_path / "out", "was not trained beside quantised layers", dequantise=True)


def test_a_failed_check_leaves_nothing(tune, student, tmp_path, monkeypatch):  # noqa: F811
    _, adapter = tune(student)
    monkeypatch.setattr("xtuner_ext.convert.export.PARITY_TOLERANCE", -1.0)
    refused(adapter, tmp_path / "out", "failed its check: the logits of the written model are off by")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


# ---------------------------------------------------------------- transformers' own models


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "up_proj"]])
def test_adapters_of_text_models_serve_both_classes(build, text_base, tmp_path, family, targets):  # noqa: F811
    """What we train goes beside transformers' own class, and what PEFT writes for that goes into ours."""
    theirs, ids = text_base(family), torch.arange(20, 40)[None]
    model = build(tmp_path / "base", lora=dict(language=dict(r=3, targets=targets))).eval()
    model._write_adapter(str(tmp_path / "base"), tmp_path / "adapter", False)
    tuned = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(tuned(ids).logits, model.llm(ids).logits, rtol=1e-4, atol=1e-4)
    tuned.save_pretrained(tmp_path / "saved")
    merge_adapter(tmp_path / "saved", tmp_path / "out", base=str(tmp_path / "base"))
    merged = HybridVLForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_language_model_keeps_its_class(tmp_path, write_text_model, family):
    model = write_text_model(tmp_path / "base", family)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, 96, (1, 20))

    @torch.no_grad()
    def probe(model):
        return model(input_ids=ids).logits

    expected = probe(tuned)
    folders = (str(tmp_path / "base"), str(tmp_path / "adapter"), tmp_path / "out")
    merge_transformers(AutoModelForCausalLM, *folders, lambda folder: None, probe)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(merged).__name__.lower().startswith(family)
    torch.testing.assert_close(probe(merged), expected, rtol=1e-4, atol=1e-4)
    assert read_adapter(tmp_path / "adapter")[2] == {}
