"""Tokenizers and processors as real folders bring them."""

import json
import shutil

import pytest

from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.teacher import EMBEDDED, load_processor, load_tokenizer, read_model_config
from xtuner_ext.data.masking import encode_conversation
from xtuner_ext.data.template_fit import fit_template
from xtuner_ext.errors import UserError
from xtuner_ext.modeling import HybridVLProcessor

REMOTE = "from transformers import PreTrainedTokenizerFast\n\nclass MineTokenizer(PreTrainedTokenizerFast):\n    pass\n"


@pytest.fixture
def folder(tmp_path):
    """Folder of the shipped teacher's tokenizer, and a function that edits its settings."""
    load_tokenizer(EMBEDDED["digits-teacher"]).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"

    def edit(**changes):
        settings = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))

    return tmp_path, edit


@pytest.fixture
def remote(folder):
    """Folder of a tokenizer that is code of its own."""
    path, edit = folder
    (path / "tokenization_mine.py").write_text(REMOTE)
    edit(tokenizer_class="MineTokenizer", auto_map={"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]})
    return path


def test_a_tokenizer_without_padding_pads_with_its_end(folder):
    path, edit = folder
    edit(pad_token=None)
    processor = HybridVLProcessor(load_tokenizer(path))
    batch = processor(["What is 3 plus 4?", "Yes"])
    row, mask = batch["input_ids"][1], batch["attention_mask"][1]
    assert (row[mask == 0] == processor.tokenizer.eos_token_id).all() and 0 < mask.sum() < len(mask)


def test_an_exported_folder_keeps_and_runs_its_tokenizers_code(remote, tmp_path):
    family, config = read_model_config(EMBEDDED["digits-teacher"])
    config.save_pretrained(tmp_path / "out")
    written = HybridVLProcessor(load_tokenizer(remote, trust_remote_code=True), image_size=32, tokens_per_tile=4)
    written.save_pretrained(tmp_path / "out")
    found = load_processor(tmp_path / "out", trust_remote_code=True)
    assert type(found.tokenizer).__name__ == "MineTokenizer" and found.settings == written.settings
    with pytest.raises(UserError, match="allow that with trust_remote_code"):
        load_processor(tmp_path / "out")


def test_a_missing_package_of_the_tokenizers_code_is_named(remote):
    (remote / "tokenization_mine.py").write_text("import a_package_that_is_missing\n" + REMOTE)
    with pytest.raises(UserError, match=f"{remote} has no tokenizer that loads: .*a_package_that_is_missing"):
        load_tokenizer(remote, trust_remote_code=True)


def test_a_tokenizer_of_an_unknown_kind_is_refused(folder):
    (folder[0] / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "New"}}))
    with pytest.raises(UserError, match="has no tokenizer that loads: "):
        load_tokenizer(folder[0])


def test_a_sentencepiece_file_alone_is_enough(tmp_path, repository):
    pytest.importorskip("google.protobuf")
    sentencepiece = pytest.importorskip("sentencepiece")
    # As the folder of vicuna-7b-v1.5 is.
    sentencepiece.SentencePieceTrainer.train(
        input=str(repository / "README.md"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, num_threads=1,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    template = fit_template("vicuna_v1", tokenizer)
    ids, labels = encode_conversation(tokenizer, template, [("Is it?", "It is.")])
    assert ids[0] == tokenizer.bos_token_id and labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(labels[labels >= 0]) == "It is.</s>"


def test_an_unknown_dtype_is_named():
    for word in ("bf16", "int8"):
        with pytest.raises(UserError, match=f"dtype of the teacher is '{word}', expected 'float32'"):
            load_teacher("digits-teacher", dtype=word)


def test_an_index_without_a_map_is_named(tmp_path):
    shutil.copy(EMBEDDED["digits-teacher"] / "config.json", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content in ("[]", "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(UserError, match=str(index)):
            load_teacher(tmp_path)
