"""A hybrid student with an image front end, its folder, and batches for it; fixtures of several folders of tests."""

import pytest
import torch

from tests.reference.vision_language import randomise, write_internvl2
from xtuner_ext.convert import load_teacher
from xtuner_ext.convert.export import write_model
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.modeling import HybridVLConfig, HybridVLForCausalLM


@pytest.fixture(scope="session")
def internvl2(digits, tmp_path_factory):
    """Folder of a random two-layer InternVL2 in its authors' layout, in fp32."""
    folder = tmp_path_factory.mktemp("internvl2")
    write_internvl2(folder, str(digits / "tokenizer"), "internlm2")
    return folder


@pytest.fixture(scope="session")
def student(internvl2, tmp_path_factory):
    """Folder of a hybrid student of it in fp32: attention, then Mamba-2."""
    config = load_teacher(internvl2).config.to_dict()
    mixer = dict(qk_norm="l2", use_rope=True, gate_bias=True, window=4, sink=True)
    config = HybridVLConfig.from_dict({**config, "layer_types": ["full_attention", "linear_attention"], "mixer": mixer})
    out = tmp_path_factory.mktemp("students") / "student"
    model = randomise(HybridVLForCausalLM(config))
    write_model(model, load_processor(internvl2), out, internvl2, torch.float32)
    return out


@pytest.fixture
def batch():
    """Function that makes a padded batch of random samples for a model; a sample is (tiles, text tokens, trained)."""

    def make(model, *samples, seed=0):
        generator = torch.Generator().manual_seed(seed)
        config, rows, labels = model.config, [], []
        for tiles, words, trained in samples:
            ids = torch.randint(20, 80, (words,), generator=generator)
            image = torch.full((tiles * config.tokens_per_tile,), config.image_token_id)
            rows.append(torch.cat([ids[:2], image, ids[2:]]))
            labels.append(rows[-1].clone())
            labels[-1][: len(rows[-1]) - trained] = -100
        size = config.vision["image_size"]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            "pixel_values": torch.randn(sum(s[0] for s in samples), 3, size, size, generator=generator),
        }

    return make


@pytest.fixture
def build():
    """Function that builds a SupervisedModel of a folder, its adapters away from their start."""
    from xtuner_ext.finetune import SupervisedModel

    def build(folder, move=0.05, **options):
        torch.manual_seed(0)
        llm = dict(type=load_teacher, pretrained_model_name_or_path=str(folder), dtype="float32")
        model = SupervisedModel(llm=llm, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(move * torch.randn_like(parameter))
        return model

    return build
