"""A tied text teacher on its whole way: three stages, export, other people's code, chat, scores."""

import json
import sys

import pytest
import torch
from mmengine.config import ConfigDict

from xtuner_ext.cli.main import run as xtuner_ext
from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.export import export_student, logits_difference
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.distill import DistillModel
from xtuner_ext.distill.optim import TrainableParameters

from .conftest import WITHOUT_PACKAGE, run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, write_text_model, digits_processor):
    """Folder of a small tied Qwen2 with a tokenizer."""
    folder = tmp_path_factory.mktemp("text") / "teacher"
    write_text_model(folder, "qwen2", tie_word_embeddings=True, vocab_size=400, max_position_embeddings=512)
    digits_processor.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(teacher):
    """Meta file of text questions."""
    lines = [
        {
            "id": str(n),
            "conversations": [
                {"from": "human", "value": f"What is {n} plus 2?"},
                {"from": "gpt", "value": str(n + 2)},
            ],
        }
        for n in range(4)
    ]
    (teacher.parent / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (teacher.parent / "q.json").write_text(json.dumps({"q": {"annotation": "q.jsonl"}}))
    return teacher.parent / "q.json"


def build(teacher, stage, **options):
    llm = dict(type=load_teacher, pretrained_model_name_or_path=str(teacher), dtype="float32")
    return DistillModel(llm=llm, stage=stage, **options)


def step(model, teacher, questions):
    """One optimizer step on one batch; returns the losses."""
    dataset = ConversationDataset(questions, load_processor(teacher), "internlm2_chat")
    batch = conversation_collate([dataset[n] for n in range(2)])
    optimizer = dict(type="AdamW", lr=1e-2)
    wrapper = TrainableParameters(dict(type="OptimWrapper", optimizer=optimizer))(model)
    losses = model(**batch, mode="loss")
    wrapper.update_params(losses["loss"])
    return losses


def shares_its_head(llm):
    return llm.lm_head.weight is llm.model.embed_tokens.weight


STAGES = {
    "stage1": (1, {}),
    "stage2": (2, {}),
    "stage3": (3, {}),
    "hybrid": (3, {"attention_layers": [0]}),
    "all": (3, {"trainable": "all"}),
}


@pytest.mark.parametrize("stage, options", STAGES.values(), ids=STAGES)
def test_a_step_moves_what_trains_and_leaves_the_teacher(teacher, questions, stage, options):
    model = build(teacher, stage, **options)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = step(model, teacher, questions)
    assert torch.isfinite(losses["loss"]) and losses["loss"] > 0
    assert shares_its_head(model.llm)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved and moved <= trained
    assert any(name.endswith("q_proj.bias") for name in moved) == (stage > 1)
    head = "llm.model.embed_tokens.weight"
    assert (head in moved) == (options.get("trainable") == "all")
    if options.get("trainable") == "all":
        assert torch.equal(model.teacher.lm_head.weight, before[head])


def test_stages_follow_each_other(teacher, questions, tmp_path):
    previous = None
    for stage, options in ((1, {}), (2, {}), (3, {"trainable": "all"})):
        model = build(teacher, stage, pretrained_pth=previous, **options)
        step(model, teacher, questions)
        previous = str(tmp_path / f"stage{stage}.pth")
        torch.save({"state_dict": model.state_dict(), "meta": {"distill": model.describe()}}, previous)
    again = build(teacher, 3, trainable="all")
    assert again.load_state_dict(torch.load(previous, weights_only=True)["state_dict"]).unexpected_keys == []
    assert shares_its_head(again.llm)
    assert torch.equal(again.llm.lm_head.weight, model.llm.lm_head.weight)


@pytest.fixture(scope="module", params=["mixers", "all"])
def export(request, teacher, questions):
    """A stage-3 hybrid after one step, as it is in memory and as it was written."""
    model = build(teacher, 3, attention_layers=[1], trainable=request.param)
    step(model, teacher, questions)
    out = teacher.parent / f"export_{request.param}"
    llm = ConfigDict(pretrained_model_name_or_path=str(teacher))
    config = ConfigDict(model=dict(llm=llm), train_dataloader=dict(dataset=dict(processor={})))
    model.to_hf(config, str(out), fp32=True)
    return model.llm, out


def test_the_exported_model_is_the_trained_one(export):
    trained, out = export
    written = load_teacher(out)
    assert shares_its_head(written) and logits_difference(written, trained) < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["vision"] is None
    assert config["template"] == "internlm2_chat"


def test_bf16_export_keeps_the_tie(teacher, tmp_path):
    model = build(teacher, 3)
    export_student(model.student_config, model.student_state(), teacher, tmp_path / "out", torch.bfloat16)
    written = load_teacher(tmp_path / "out")
    assert shares_its_head(written) and written.lm_head.weight.dtype == torch.bfloat16
    assert shares_its_head(type(written).from_pretrained(tmp_path / "out"))


SCRIPT = WITHOUT_PACKAGE + """
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, ids, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert model.lm_head.weight is model.model.embed_tokens.weight
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, logits)
generate = pipeline("text-generation", model=folder, tokenizer=folder, trust_remote_code=True)
messages = [{"role": "user", "content": "What is 3 plus 2?"}]
answer = generate(messages, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
assert answer["role"] == "assistant" and isinstance(answer["content"], str)
batch = generate(["What is 3", "Why"], max_new_tokens=3, do_sample=False, batch_size=2)
assert [len(row) for row in batch] == [1, 1]
"""


def test_others_load_it_without_this_package(export, tmp_path):
    trained, out = export
    ids = torch.randint(0, 381, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", SCRIPT, out, tmp_path / "ids.pt", tmp_path / "logits.pt"]
    result = run(command, tmp_path, variables={"XTUNER_EXT": "0", "HF_HOME": str(tmp_path / "hf")})
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = trained(ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_chat_and_eval_without_images(kind, teacher, export, questions, tmp_path, capsys):
    folder = str(teacher if kind == "teacher" else export[1])
    assert xtuner_ext(["chat", folder, "--prompt", "What is 3 plus 2?", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    argv = ["eval", folder, "--data", str(questions), "--out", str(tmp_path / "s"), "--max-new-tokens", "2", "--json"]
    assert xtuner_ext(argv) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["count"] == 4 and metrics["settings"]["template"] == "internlm2_chat"


def test_an_image_for_a_text_model_is_an_error(teacher, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert xtuner_ext(["chat", str(teacher), "--image", str(tmp_path / "x.png"), "--prompt", "What?"]) == 2
    assert "has no image front end, --image can not be used" in capsys.readouterr().err


def test_without_a_known_template_one_is_asked_for(teacher, questions, tmp_path, capsys, digits_processor):
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in teacher.iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).write_bytes(path.read_bytes())
    scores = ["--data", str(questions), "--out", str(tmp_path / "s")]
    for argv in (["chat", str(folder), "--prompt", "Hi"], ["eval", str(folder), *scores]):
        assert xtuner_ext(argv) == 2
        error = capsys.readouterr().err
        assert f"{folder} names no conversation template" in error and "choose one with --prompt-template" in error
    argv = ["chat", str(folder), "--prompt", "Hi", "--max-new-tokens", "2", "--prompt-template"]
    assert xtuner_ext([*argv, "vicuna"]) == 0
    assert xtuner_ext([*argv, "llama3_chat"]) == 2
    assert "'llama3_chat' does not fit the tokenizer" in capsys.readouterr().err
    model = build(folder, 3)
    export_student(model.student_config, model.student_state(), folder, tmp_path / "out", torch.float32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["template"] is None
    assert load_processor(tmp_path / "out").tokenizer.chat_template is None
