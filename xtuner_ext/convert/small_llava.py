"""Parts of a LLaVA with random weights, in the layout of published ones, for runs that a CPU finishes in a minute."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ..data.sources.folder import is_made, new_folder
from ..modeling import HybridVLConfig, HybridVLForCausalLM
from ..modeling.processing import HybridVLProcessor
from . import llama
from .export import write_model

# The template's marks are words of the vocabulary, as in InternLM's and in Qwen's.
SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "<eoh>", "<eoa>", "<|User|>", "<|Bot|>", "<|System|>", "<|im_start|>", "<|im_end|>"),
)


def make_small_parts(out, data, seed=0, width=128, layers=2, image_size=56):
    """Write a Llama, the same with Mamba-2 in its last layer, and a CLIP vision tower, all of random weights.

    Args:
        out (str | Path): Folder to create, with ``llm``, ``hybrid_llm`` and ``clip``; it appears whole or not at all.
            When it was made with the same arguments it is left alone.
        data (str | Path): Folder of ``make_photographs``; the tokenizer learns from its conversations.
        seed (int): Seed of the weights.
        width (int): Of the language models.
        layers (int): Of the language models and of the tower, which has one more.
        image_size (int): Side of a picture in pixels; a visual token covers 14.

    Returns:
        Path: The folder.
    """
    out, settings = Path(out), {"seed": seed, "width": width, "layers": layers, "image_size": image_size}
    if is_made(out, settings, "make_small_parts"):
        return out
    tokenizer = train_tokenizer(Path(data) / "llava.json")
    with torch.random.fork_rng(), new_folder(out, settings) as work:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=width**-0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(work / "llm")
        tokenizer.save_pretrained(work / "llm")
        _write_hybrid(config, tokenizer, work / "hybrid_llm")
        tower = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers + 1,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=14,
        )
        CLIPVisionModel(tower).save_pretrained(work / "clip")
        square = {"height": image_size, "width": image_size}
        CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=square).save_pretrained(work / "clip")
    return out


def train_tokenizer(conversations):
    """Train a byte-level tokenizer on LLaVA's JSON.

    Args:
        conversations (Path): A list of samples.

    Returns:
        PreTrainedTokenizerFast: Adds ``<s>`` in front, as Llama's does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    samples = json.loads(conversations.read_text(encoding="utf-8"))
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((turn["value"] for sample in samples for turn in sample["conversations"]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
    )


def _write_hybrid(config, tokenizer, out):
    fields = llama.model_config(config.to_dict()).to_dict()
    kinds = ["full_attention"] * (config.num_hidden_layers - 1) + ["linear_attention"]
    mixer = dict(use_rope=True, gate_bias=True, qk_norm="l2")
    model = HybridVLForCausalLM(HybridVLConfig.from_dict({**fields, "layer_types": kinds, "mixer": mixer}))
    write_model(model, HybridVLProcessor(tokenizer, tokens_per_tile=0), out, "nothing", torch.float32)
