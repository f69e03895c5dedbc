"""A windowed student with a sink through all stages: interrupted, exported, and loaded by others."""

import json
import sys

import torch

from xtuner_ext.cli.main import run as xtuner_ext
from xtuner_ext.convert import load_teacher
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.distill.stages import read_checkpoint

from .conftest import WITHOUT_PACKAGE, run

SCRIPT = WITHOUT_PACKAGE + """
from transformers import AutoModelForCausalLM
folder, inputs, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
inputs = torch.load(inputs)
with torch.no_grad():
    whole = model(**inputs, use_cache=False).logits
    torch.save(whole, logits)
    # Read token by token, the window and the state of the cache give the same.
    prompt = inputs["input_ids"].shape[1] - 6
    first = {**inputs, "input_ids": inputs["input_ids"][:, :prompt]}
    output = model(**first, use_cache=True)
    for index in range(prompt, prompt + 6):
        token = inputs["input_ids"][:, index : index + 1]
        output = model(token, past_key_values=output.past_key_values)
        assert torch.allclose(output.logits[:, 0], whole[:, index], atol=1e-4), index
"""


def train(project, stage, *options):
    assert xtuner_ext(["train", str(project / f"{stage}.py"), "--cfg-options", "custom_hooks=[]", *options]) == 0


def test_three_stages_an_interruption_and_an_export(small_project, tmp_path, digits, digits_processor):
    hybrid = "model.attention_layers=[1]"
    train(small_project, "stage1")
    train(small_project, "stage2")
    train(small_project, "stage3_linear", hybrid)
    stage3 = tmp_path / "work" / "stage3_linear"
    whole, found = read_checkpoint(str(stage3 / "iter_5.pth"))
    assert found["mixer"]["window"] == 4 and found["mixer"]["sink"]
    first = read_checkpoint(str(tmp_path / "work" / "stage1" / "iter_2.pth"))[0]
    for key in ("sink_key", "sink_value", "share_proj.weight"):
        name = f"llm.model.layers.2.mixer.mamba.{key}"
        assert not torch.equal(whole[name], first[name]), key
    (stage3 / "iter_4.pth").unlink()
    (stage3 / "iter_5.pth").unlink()
    train(small_project, "stage3_linear", hybrid)
    again = read_checkpoint(str(stage3 / "iter_5.pth"))[0]
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)

    out, config = tmp_path / "out", str(small_project / "stage3_linear.py")
    argv = ["convert", "pth_to_hf", config, str(stage3 / "iter_5.pth"), str(out), "--fp32", "--cfg-options", hybrid]
    assert xtuner_ext(argv) == 0
    written = json.loads((out / "config.json").read_text())
    assert (written["mixer"]["window"], written["mixer"]["sink"]) == (4, True)
    assert [i for i, word in enumerate(written["layer_types"]) if word == "full_attention"] == [1]
    student = load_teacher(out)
    for name, value in student.state_dict().items():
        trained = whole.get("llm." + name.replace(".mixer.", ".mixer.mamba."))
        assert trained is None or torch.equal(value, trained), name

    sample = ConversationDataset(str(digits / "test.json"), digits_processor, "internlm2_chat")[0]
    inputs = {key: conversation_collate([sample])["data"][key] for key in ("input_ids", "pixel_values")}
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", SCRIPT, out, tmp_path / "inputs.pt", tmp_path / "logits.pt"]
    result = run(command, tmp_path, variables={"XTUNER_EXT": "0", "HF_HOME": str(tmp_path / "hf")})
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = student(**inputs, use_cache=False).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)
