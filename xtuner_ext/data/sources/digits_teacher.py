"""What the digits teacher is trained from: data, a tokenizer and HoVLE-shaped random weights."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..annotation import JsonlAnnotations
from ..meta import read_meta
from ..templates import get_template
from .digits import IMAGE_SIZE, make_digits

# Order gives the ids: pad 0, bos 1 and eos 2 as InternLM2 has them.
SPECIAL_TOKENS = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
]


def prepare_teacher(
    out, seed=0, train=40000, test=1200, vocab_size=384, template="internlm2_chat", named_presence=False
):
    """Make the teacher's data and its tokenizer, unless they are there.

    Args:
        out (str | Path): Folder for the data; the tokenizer lies in ``tokenizer`` below it.
        seed (int): Seed of the composition.
        train (int): Training samples.
        test (int): Held-out questions.
        vocab_size (int): Tokens, bytes and special ones included.
        template (str): Conversation template that the tokenizer sees.
        named_presence (bool): See :func:`make_digits`.
    """
    make_digits(out, seed=seed, train=train, test=test, named_presence=named_presence)
    folder = Path(out) / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        make_tokenizer(Path(out) / "train.json", vocab_size, template).save_pretrained(folder)


def make_tokenizer(meta, vocab_size, template):
    """Train a byte-level BPE tokenizer on rendered conversations.

    Args:
        meta (str | Path): Meta JSON of the training data.
        vocab_size (int): Tokens, bytes and special ones included.
        template (str): Conversation template.

    Returns:
        PreTrainedTokenizerFast: Adds ``<s>`` in front, as InternLM2's does.
    """
    entry = read_meta(meta)[0]
    layout = get_template(template)
    tokenizer = Tokenizer(models.BPE())
    # A digit is always one token of its own, so that numbers are read digit by digit.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    annotations = JsonlAnnotations(entry.annotation, entry.root)
    texts = (
        layout.prompt(question.replace("<image>\n", ""), first=number == 0) + answer
        for index in range(len(annotations))
        for number, (question, answer) in enumerate(annotations[index].turns)
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=32768,
        padding_side="left",
        chat_template=layout.jinja(),
        clean_up_tokenization_spaces=False,
    )


def teacher_config(tokenizer, hidden_size, intermediate_size, heads, kv_heads, embedding_layers, llm_layers):
    """HoVLE's config.json at the digits' size.

    Args:
        tokenizer (PreTrainedTokenizerBase): Gives vocabulary and special ids.
        hidden_size (int): Model width D.
        intermediate_size (int): Width of the MLPs.
        heads (int): Query heads.
        kv_heads (int): Key/value heads.
        embedding_layers (int): Layers of the holistic embedding.
        llm_layers (int): Layers of the language model.

    Returns:
        dict: Content of ``config.json`` in HoVLE's layout.
    """
    shared = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 2048,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internlm2_chat",
        "force_image_size": IMAGE_SIZE,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 1,
        "ps_version": "v2",
        "embedding_config": {
            **shared,
            "model_type": "holistic_embedding",
            "num_hidden_layers": embedding_layers,
            "patch_size": 8,
            "image_size": IMAGE_SIZE,
            "num_channels": 3,
            "downsample_ratio": 0.5,
            "pixel_shuffle_loc": "pre",
            "use_pixel_shuffle_proj": True,
            "use_ls": False,
            "img_context_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            "llm_vocab_size": len(tokenizer),
            "llm_hidden_size": hidden_size,
        },
        "llm_config": {
            **shared,
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "num_hidden_layers": llm_layers,
            "vocab_size": len(tokenizer),
            "bias": False,
            "tie_word_embeddings": False,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    }
