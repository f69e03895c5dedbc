"""Parts put together: the assembled model against the parts themselves."""

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel, LlamaForCausalLM, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from xtuner_ext.convert.llava_folder import make_llava
from xtuner_ext.convert.llava_parts import assemble, load_llava, load_tower, make_projector
from xtuner_ext.convert.small_llava import make_small_parts
from xtuner_ext.convert.teacher import load_processor, load_teacher, load_tokenizer
from xtuner_ext.data.sources.photographs import make_photographs
from xtuner_ext.errors import UserError


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return make_small_parts(folder / "parts", make_photographs(folder / "data", views=1, choices=1), width=32)


@pytest.fixture(scope="module")
def siglip(parts):
    """Folder of a SigLIP tower without a class token."""
    folder = parts.parent / "siglip"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
        SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@torch.no_grad()
def by_hand(llm, tower, projector, ids, place, pixels, select_layer=-2):
    """Logits from the parts' own forward passes."""
    hidden = tower(pixels, output_hidden_states=True).hidden_states[select_layer]
    visual = projector(hidden[:, 1:] if isinstance(tower, CLIPVisionModel) else hidden)
    words = llm.get_input_embeddings()(ids)
    embeds = torch.cat([words[:, :place], visual, words[:, place:]], dim=1)
    return llm(inputs_embeds=embeds).logits


@torch.no_grad()
def whole(model, ids, place, pixels):
    slots = torch.full((1, model.config.tokens_per_tile), model.config.image_token_id)
    ids = torch.cat([ids[:, :place], slots, ids[:, place:]], dim=1)
    return model(ids, pixel_values=pixels).logits


@pytest.mark.parametrize("tower_name", ["clip", "siglip"])
@pytest.mark.parametrize("select_layer", [-2, -1, 1])
def test_an_assembled_llama_is_its_parts(parts, siglip, tower_name, select_layer):
    llm = LlamaForCausalLM.from_pretrained(parts / "llm").eval()
    tower = load_tower(parts / "clip" if tower_name == "clip" else siglip)
    if tower_name == "siglip" and select_layer == -1:
        # Its last hidden state is the one before the final norm.
        tower.post_layernorm = torch.nn.Identity()
    projector = make_projector(tower.config.hidden_size, 32)
    tokenizer = load_tokenizer(parts / "llm")
    model = assemble(llm, tower, projector, tokenizer, select_layer)
    size, words = tower.config.image_size, len(tokenizer) - 1
    assert model.config.vocab_size == words + 1 and model.config.image_token_id == words
    ids, pixels = torch.randint(0, words, (1, 9)), torch.randn(1, 3, size, size)
    expected = by_hand(llm, tower, projector, ids, 4, pixels, select_layer)
    found = whole(model, ids, 4, pixels)[..., :words]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_assembled_hybrid_is_its_parts(parts):
    llm, tower = load_teacher(parts / "hybrid_llm"), load_tower(parts / "clip")
    projector = make_projector(64, 32)
    model = assemble(llm, tower, projector, load_tokenizer(parts / "hybrid_llm"))
    ids, pixels = torch.randint(0, 100, (1, 9)), torch.randn(1, 3, 56, 56)
    expected = by_hand(llm, tower, projector, ids, 2, pixels)
    torch.testing.assert_close(whole(model, ids, 2, pixels)[..., :-1], expected, rtol=1e-4, atol=1e-4)


def test_a_folder_is_made_once_and_takes_several_images(parts, siglip, tmp_path):
    out = make_llava(parts / "hybrid_llm", siglip, tmp_path / "start", template="internlm_chat")
    model, processor = load_teacher(out), load_processor(out)
    assert (model.config.template, processor.normalisation, processor.fit) == ("internlm_chat", "siglip", "pad")
    images = [Image.new("RGB", (40, 20), colour) for colour in ("red", "green", "blue")]
    batch = processor(["<image> or <image>?", "<image>?"], images=images)
    assert batch["pixel_values"].shape[0] == 3
    assert torch.isfinite(model(**batch).logits).all()
    made = (out / "model.safetensors").stat().st_mtime_ns
    make_llava(parts / "hybrid_llm", siglip, out, template="internlm_chat")
    assert (out / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(UserError, match="was made with"):
        make_llava(parts / "llm", siglip, out, template="internlm_chat")


def test_a_trained_projector_is_taken(parts, tmp_path):
    projector = make_projector(64, 32)
    state = {f"projector.model.{key}": value for key, value in projector.state_dict().items()}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "iter_1.pth")
    model = load_teacher(make_llava(parts / "llm", parts / "clip", tmp_path / "a", projector=tmp_path / "iter_1.pth"))
    assert torch.equal(model.vision.projector[2].weight, projector[2].weight)
    torch.save({"state_dict": {}, "meta": {}}, tmp_path / "iter_2.pth")
    with pytest.raises(UserError, match="holds no projector from width 64 to 32"):
        make_llava(parts / "llm", parts / "clip", tmp_path / "b", projector=tmp_path / "iter_2.pth")
    assert not (tmp_path / "b").exists()


@pytest.fixture
def converted(parts, tmp_path):
    """Folder as ``convert pth_to_hf`` writes it for a projector alone."""
    from xtuner.model.modules import ProjectorConfig, ProjectorModel

    projector = ProjectorModel(ProjectorConfig(visual_hidden_size=64, llm_hidden_size=32))
    projector.save_pretrained(tmp_path / "hf" / "projector")
    return tmp_path / "hf"


def test_parts_are_loaded_as_one(parts, converted):
    model, processor = load_llava(str(parts / "llm"), str(converted), str(parts / "clip"))
    batch = processor("<image>\nWhat?", images=[Image.new("RGB", (50, 30))])
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16 == model.config.tokens_per_tile
    assert torch.isfinite(model(**batch).logits).all()


def test_parts_that_do_not_belong_together(parts, converted, siglip, tmp_path):
    llm, clip, hf = str(parts / "llm"), str(parts / "clip"), str(converted)
    with pytest.raises(UserError, match="holds no vision tower: name the one"):
        load_llava(llm, hf)
    with pytest.raises(UserError, match="the projector has weights of the shapes"):
        load_llava(llm, hf, str(siglip))
    with pytest.raises(UserError, match="has no folder projector"):
        load_llava(llm, clip, clip)
    with pytest.raises(UserError, match="expected a vision tower"):
        load_llava(llm, hf, llm)
    with pytest.raises(UserError, match="layer -9 of the vision tower"):
        load_llava(llm, hf, clip, select_layer=-9)
    with pytest.raises(UserError, match="is not a folder and can not be downloaded"):
        load_llava("nobody/nothing", hf, clip)
    (converted / "config.json").touch()
    with pytest.raises(UserError, match="holds the tuned language model itself"):
        load_llava(llm, hf, clip)
