"""InternVL2 and LLaVA teachers through everything that a HoVLE teacher goes through."""

import json
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from tests.reference.vision_language import write_internvl2, write_llava, write_original_llava
from xtuner_ext.cli import chat, eval, inspect
from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.export import export_student, logits_difference
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.distill import DistillModel
from xtuner_ext.modeling import HybridVLForCausalLM

from .conftest import WITHOUT_PACKAGE, run

WRITERS = {"llava": write_llava, "llava of its authors": write_original_llava, "internvl2": write_internvl2}
MIXERS = dict(mixer=dict(qk_norm="l2", gate_bias=True), seeding=dict(A_log=0.0, dt_spacing="log", gate="open"))


@pytest.fixture(scope="module", params=WRITERS)
def teacher(request, digits, tmp_path_factory):
    """Folder of a teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    options = {"family": "internlm2"} if request.param == "internvl2" else {}
    WRITERS[request.param](folder, str(digits / "tokenizer"), **options)
    return folder


def build(folder, stage, **options):
    llm = dict(type=load_teacher, pretrained_model_name_or_path=str(folder))
    return DistillModel(llm=llm, stage=stage, **MIXERS, **options)


@pytest.fixture(scope="module")
def batch(teacher, digits):
    """Two samples with pictures, as the dataset gives them."""
    processor = load_processor(teacher)
    template = load_teacher(teacher).config.template
    dataset = ConversationDataset(str(digits / "train.json"), processor, template)
    return conversation_collate([dataset[0], dataset[1]])["data"]


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """A trained hybrid student and the folder it was exported to."""
    model = build(teacher, 3, attention_layers=[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model._activate("linear_attention")
    out = tmp_path_factory.mktemp("student") / "out"
    export_student(
        model.student_config, model.student_state(), str(teacher), out, torch.float32, trained_model=model.llm.eval()
    )
    return model.llm, out


# ---------------------------------------------------------------- distillation


@pytest.mark.parametrize(
    "stage, options", [(1, {}), (2, {}), (3, {}), (3, dict(trainable="all"))], ids=["1", "2", "3", "3 all"]
)
def test_stages_train_what_they_should(teacher, batch, stage, options):
    model = build(teacher, stage, **options).train()
    loss = model.compute_loss(**batch)["loss"]
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert torch.isfinite(loss) and loss > 0
    assert any(name.startswith("llm.vision.") for name in trained) == (options.get("trainable") == "all")
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_batch_of_text_alone_gives_every_trained_weight_a_gradient(teacher, batch):
    model = build(teacher, 3, trainable="all").train()
    ids = torch.where(batch["input_ids"] == model.llm.config.image_token_id, 5, batch["input_ids"])
    model.compute_loss(**{**batch, "input_ids": ids, "pixel_values": batch["pixel_values"][:0]})["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_tower_moves_only_when_all_weights_train(teacher, batch):
    model = build(teacher, 3, trainable="all").train()
    before = model.llm.vision(batch["pixel_values"]).detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.compute_loss(**batch)["loss"].backward()
    optimizer.step()
    assert not torch.equal(model.llm.vision(batch["pixel_values"]), before)
    assert torch.equal(model.teacher.vision(batch["pixel_values"]), before)


def test_gradient_checkpointing_reaches_the_tower(teacher, batch):
    losses = []
    for checkpointing in (False, True):
        model = build(teacher, 3, trainable="all").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model.compute_loss(**batch)["loss"]
        loss.backward()
        norm = sum(parameter.grad.norm() for parameter in model.llm.vision.parameters())
        losses.append((loss.item(), norm.item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][1] > 0


# ---------------------------------------------------------------- export


def test_the_written_student_is_the_trained_one(student):
    trained, out = student
    written = AutoModelForCausalLM.from_pretrained(out).eval()
    assert logits_difference(written, trained) < 1e-5
    assert written.vision.tower.config._attn_implementation == "sdpa"
    assert (out / "vit.py").is_file()


def test_bf16_student(teacher, student, tmp_path):
    model = build(teacher, 3)
    export_student(model.student_config, model.student_state(), str(teacher), tmp_path / "out", trained_model=None)
    written = HybridVLForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in written.vision.parameters()} == {torch.bfloat16}
    config = written.config
    pixels = torch.randn(1, 3, config.vision["image_size"], config.vision["image_size"])
    assert torch.isfinite(written.vision(pixels)).all()


def test_the_student_has_its_teachers_processor(teacher, student):
    theirs, ours = load_processor(teacher), load_processor(student[1])
    assert ours.settings == theirs.settings
    image = Image.new("RGB", (40, 20), "red")
    for key, expected in theirs("What? <image>", images=[image]).items():
        assert torch.equal(ours("What? <image>", images=[image])[key], expected), key


def test_the_student_loads_without_this_package(student, tmp_path):
    script = WITHOUT_PACKAGE + """
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a 7?"}]}]
text = processor.apply_chat_template(message, tokenize=False)
inputs = processor(text, images=[Image.new("RGB", (40, 30), "red")])
torch.save(model(**inputs).logits, sys.argv[2])
torch.save(dict(inputs), sys.argv[3])
assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1
"""
    files = [tmp_path / "logits.pt", tmp_path / "inputs.pt"]
    variables = {"XTUNER_EXT": "0", "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run([sys.executable, "-c", script, student[1], *files], tmp_path, variables=variables)
    assert result.returncode == 0, result.stderr
    expected = student[0](**torch.load(files[1])).logits
    torch.testing.assert_close(torch.load(files[0]), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_rows_of_a_left_padded_batch_answer_as_they_do_alone(teacher, student, which):
    folder = teacher if which == "teacher" else student[1]
    model = load_teacher(folder)
    processor = load_processor(folder)
    kinds = [((40, 30), "red"), ((20, 50), "blue"), ((16, 16), "white")]
    pictures = [Image.new("RGB", size, colour) for size, colour in kinds]
    prompts = [("Is there a 7?", []), ("<image> Which is larger?", pictures[:1]), ("<image><image> Sum?", pictures[1:])]
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    together = processor([text for text, _ in prompts], images=[images for _, images in prompts])
    rows = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for row, (text, images) in zip(rows, prompts):
        alone = processor(text, images=images)
        expected = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert row.tolist() == expected.tolist()


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_inspect_counts_what_is_loaded(teacher, student, which):
    folder = teacher if which == "teacher" else student[1]
    report = inspect.inspect_folder(str(folder))
    own = sum(parameter.numel() for parameter in load_teacher(folder).parameters())
    assert report["image_front_end"] == "vit" and report["models"][0]["parameters"] == own
    assert report["stored_parameters"] >= own - 64


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_chat_and_eval(teacher, student, which, digits, tmp_path, capsys):
    folder = str(teacher if which == "teacher" else student[1])
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 48), "red").save(picture)
    one_shot = ["--image", str(picture), "--image", str(picture), "--prompt", "Which?", "--max-new-tokens", "4"]
    assert chat.main([folder, *one_shot]) == 0
    capsys.readouterr()
    argv = [folder, "--data", str(digits / "test.json"), "--out", str(tmp_path / "s"), "--limit", "6"]
    assert eval.main([*argv, "--max-new-tokens", "2"]) == 0
    metrics = json.loads((tmp_path / "s" / "metrics.json").read_text())
    assert metrics["count"] == 6 and metrics["settings"]["template"] in ("vicuna_v1", "internlm2-chat")
