"""The Hugging Face model; importing this registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from .cache import HybridCache
from .configuration import HybridVLConfig, MixerConfig, layer_types_from_attention
from .internlm import InternLMConfig, InternLMForCausalLM, InternLMTokenizer, InternLMTokenizerOwner
from .mixers import Attention, Mamba2Mixer, PairedMixer
from .modeling import HybridDecoder, HybridVLForCausalLM
from .processing import HybridVLProcessor

AutoConfig.register(HybridVLConfig.model_type, HybridVLConfig, exist_ok=True)
# AutoModel too, because InternVL's tools load a chat model through it.
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(HybridVLConfig, HybridVLForCausalLM, exist_ok=True)
AutoProcessor.register(HybridVLConfig, HybridVLProcessor, exist_ok=True)
AutoConfig.register(InternLMConfig.model_type, InternLMConfig, exist_ok=True)
AutoModelForCausalLM.register(InternLMConfig, InternLMForCausalLM, exist_ok=True)
AutoTokenizer.register(InternLMTokenizerOwner, InternLMTokenizer, exist_ok=True)

__all__ = [
    "Attention",
    "HybridCache",
    "HybridDecoder",
    "HybridVLConfig",
    "HybridVLForCausalLM",
    "HybridVLProcessor",
    "InternLMConfig",
    "InternLMForCausalLM",
    "InternLMTokenizer",
    "Mamba2Mixer",
    "MixerConfig",
    "PairedMixer",
    "layer_types_from_attention",
]
