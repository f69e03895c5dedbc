"""A teacher's likeliest next tokens on disk, so that later passes over the same samples do without the teacher.

A cache is a folder: ``teacher_cache.json`` says what it was made from, and ``shard_00000.safetensors`` and so on hold,
for consecutive samples, ``values`` (R, K), ``ids`` (R, K) and, in fp32, ``rest`` (R,) of
:func:`~xtuner_ext.distill.top_k.top_k_targets`, and for every sample its ``source``, its ``line`` and the ``end`` of
its rows.

Values are log-probabilities, which lie between -30 and 0 where they matter: fp16 rounds them eight times finer than
bf16 in the same two bytes. Ids take two bytes where the vocabulary has at most 65,536 tokens, four otherwise. A
supervised row thus takes 4 k + 4 or 6 k + 4 bytes: 260 or 388 with k = 64, 0.1 or 0.2 percent of its fp32 logits.

Axis letters: R supervised rows, K kept tokens.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..compat import replace_file
from ..data.identity import describe_sources
from ..errors import UserError

FORMAT = 1
MANIFEST = "teacher_cache.json"
DTYPES = ("float16", "float32")


def weights_digest(teacher):
    """A few values of every weight as text, the same in whatever dtype the teacher was loaded.

    Args:
        teacher (HybridVLForCausalLM): Before any training.

    Returns:
        str | None: None for a model without values.
    """
    digest = hashlib.sha256()
    for name, weight in teacher.state_dict().items():
        if weight.is_meta:
            return None
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)].to(torch.bfloat16).cpu()
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


class TeacherCacheWriter:
    """Fills a cache, shard by shard; one that was interrupted is gone on with.

    The folder carries ``.partial`` behind its name until it is complete.

    Args:
        folder (str | Path): The cache.
        settings (dict): What the content follows from, as JSON can hold it; ``dtype`` and ``vocab_size`` say how it
            is stored.

    Raises:
        UserError: When something else lies there, or a cache of other settings.

    Attributes:
        finished (bool): Whether a cache of these settings is there already.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = Path(folder), {"format": FORMAT, **settings}
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        if self.folder.exists() and not (self.folder / MANIFEST).is_file():
            raise UserError(f"{self.folder} is there already and is no teacher cache, expected a new folder")
        self.finished = self._is_ours(self.folder)
        if not self.finished and not self._is_ours(self.partial):
            replace_file(self.partial / MANIFEST, json.dumps(self.settings, indent=1).encode())

    def _is_ours(self, folder):
        if not (folder / MANIFEST).is_file():
            return False
        counts = ("rows", "samples", "shards")
        found = {key: value for key, value in _read_manifest(folder).items() if key not in counts}
        if found == self.settings:
            return True
        was, wanted = _difference(found, self.settings)
        raise UserError(f"{folder} was made with {was}, expected {wanted}: remove it or choose another folder")

    def has_shard(self, number):
        """bool: Whether an earlier run wrote this shard."""
        return _shard(self.partial, number).is_file()

    def write_shard(self, number, samples):
        """Write one shard; it appears whole or not at all.

        Args:
            number (int): From 0 without gaps.
            samples (list[tuple]): Of every sample its source, its line, and values (R, K), ids (R, K) and rest (R,).
        """
        ids_type = np.uint16 if self.settings["vocab_size"] <= 1 << 16 else np.int32
        columns = list(zip(*samples)) if samples else [()] * 5
        k = self.settings["top_k"]
        content = {
            "values": np.concatenate([np.zeros((0, k)), *columns[2]]).astype(self.settings["dtype"]),
            "ids": np.concatenate([np.zeros((0, k)), *columns[3]]).astype(ids_type),
            "rest": np.concatenate([np.zeros(0), *columns[4]]).astype(np.float32),
            "source": np.array(columns[0], dtype=np.int64),
            "line": np.array(columns[1], dtype=np.int64),
            "end": np.cumsum([len(rest) for rest in columns[4]], dtype=np.int64),
        }
        replace_file(_shard(self.partial, number), save(content))

    def finish(self, shards):
        """Give the folder its name.

        Args:
            shards (int): All of them.

        Returns:
            dict: The manifest, with the numbers of ``samples``, ``rows`` and ``shards``.
        """
        counts = {"shards": shards, "samples": 0, "rows": 0}
        for number in range(shards):
            with safe_open(_shard(self.partial, number), framework="np") as file:
                counts["samples"] += file.get_slice("line").get_shape()[0]
                counts["rows"] += file.get_slice("rest").get_shape()[0]
        manifest = {**self.settings, **counts}
        replace_file(self.partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        self.partial.rename(self.folder)
        return manifest


class TeacherCache:
    """Reads a finished cache.

    Args:
        folder (str | Path): The cache.

    Raises:
        UserError: For a folder that is missing, unfinished, damaged or of another format.

    Attributes:
        manifest (dict): What it was made from.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            partial = self.folder.with_name(self.folder.name + ".partial")
            hint = "unfinished, let `xtuner-ext cache-teacher` go on" if partial.exists() else f"there is no {MANIFEST}"
            raise UserError(f"teacher cache {self.folder} is not there: {hint}")
        self.manifest = _read_manifest(self.folder)
        if self.manifest.get("format") != FORMAT:
            raise UserError(f"teacher cache {self.folder} has format {self.manifest.get('format')}, expected {FORMAT}")
        # Files are opened again rather than kept, once there are more than the limit of open files allows.
        self._open = functools.lru_cache(maxsize=256)(self._open_shard)
        table = [self._read_index(number) for number in range(self.manifest["shards"])]
        source, self._line, self._shard_of, self._start, self._end = (np.concatenate(column) for column in zip(*table))
        # Samples lie in the order of their sources and lines.
        begins = np.searchsorted(source, np.arange(len(self.manifest["sources"]) + 1))
        names = [entry["fingerprint"] for entry in self.manifest["sources"]]
        self._range = {name: slice(*ends) for name, *ends in zip(names, begins, begins[1:])}

    def _open_shard(self, number):
        try:
            return safe_open(_shard(self.folder, number), framework="np")
        except (OSError, SafetensorError) as error:
            raise UserError(f"teacher cache {_shard(self.folder, number)} cannot be read: {error}") from error

    def _read_index(self, number):
        file = self._open(number)
        source, line, end = (file.get_tensor(name) for name in ("source", "line", "end"))
        return source, line, np.full_like(line, number), np.concatenate([[0], end[:-1]]), end

    def check_settings(self, wanted):
        """Refuse a cache of another teacher or other targets.

        Args:
            wanted (dict): ``teacher``, ``tokens`` and ``temperature`` of the run.

        Raises:
            UserError: Naming what was found and what was expected.
        """
        was, expected = _difference({key: self.manifest[key] for key in wanted}, wanted)
        if expected:
            found = f"teacher cache {self.folder} was made with {was}"
            raise UserError(f"{found}, this run has {expected}: make another cache")

    def check_dataset(self, dataset):
        """Refuse a dataset whose samples are not in the cache.

        Args:
            dataset (ConversationDataset): The run's, perhaps within a ``PackedDataset``.

        Raises:
            UserError: Naming the source, what was found and what was expected.
        """
        while hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        known = {entry["annotation"]: entry for entry in self.manifest["sources"]}
        for (entry, _), description, name in zip(dataset.sources, describe_sources(dataset), dataset.fingerprints):
            if name in self._range:
                continue
            nearest = known.get(str(entry.annotation)) or self.manifest["sources"][0]
            was, expected = _difference(nearest["description"], description)
            raise UserError(
                f"teacher cache {self.folder} holds {nearest['annotation']} with {was}, this run reads "
                f"{entry.annotation} with {expected}: make another cache"
            )
        for position in np.unique(dataset.index, axis=0, return_index=True)[1].tolist():
            source, line = dataset.index[position].tolist()
            if self._position(dataset.fingerprints[source], line) is None:
                # Samples that are bad or too long were left out, as this run leaves them out.
                sample, _ = dataset.attempt(position)
                if sample is not None:
                    where, length = dataset.record(position).where, len(sample["input_ids"])
                    raise UserError(
                        f"teacher cache {self.folder} does not hold {where} of {length} tokens: it was made with "
                        f"max_length {self.manifest['max_length']} and {self.manifest['lines']} lines, this run has "
                        f"max_length {dataset.max_length} and perhaps another repeat_time: make another cache"
                    )

    def targets(self, keys, device):
        """Look samples up.

        Args:
            keys (list[tuple[str, int]]): Fingerprint and line of every sample, in the order of their rows.
            device (torch.device): Where the result goes.

        Returns:
            tuple[Tensor, Tensor, Tensor]: See :func:`~xtuner_ext.distill.top_k.top_k_targets`; rows of all samples one
            after another.

        Raises:
            UserError: For a sample that is not in the cache.
        """
        found = [self._rows(name, line) for name, line in keys]
        values, ids, rest = (np.concatenate(column) for column in zip(*found))
        return (
            torch.from_numpy(values).to(device).float(),
            torch.from_numpy(ids.astype(np.int64)).to(device),
            torch.from_numpy(rest).to(device),
        )

    def _position(self, name, line):
        part = self._range.get(name, slice(0, 0))
        position = part.start + np.searchsorted(self._line[part], line)
        return position if position < part.stop and self._line[position] == line else None

    def _rows(self, name, line):
        position = self._position(name, line)
        if position is None:
            raise UserError(
                f"teacher cache {self.folder} does not hold sample {line} of the data with fingerprint {name}: make "
                "the cache with this run's data, repeat_time and max_length"
            )
        slices = [self._open(int(self._shard_of[position])).get_slice(name) for name in ("values", "ids", "rest")]
        start, end = int(self._start[position]), int(self._end[position])
        if start == end:
            # safetensors refuses an empty slice at the end of a file.
            return tuple(np.zeros((0, *part.get_shape()[1:]), np.float32) for part in slices)
        return tuple(part[start:end] for part in slices)


def cache_settings(teacher, divergence, dataset, top_k, dtype, precision, shard_samples):
    """What the content of a cache follows from.

    Args:
        teacher (HybridVLForCausalLM): The teacher.
        divergence (dict): ``tokens`` and ``temperature`` of the loss.
        dataset (ConversationDataset): Samples.
        top_k (int): Tokens kept of every row.
        dtype (str): Of the stored values.
        precision (str): In which the teacher runs.
        shard_samples (int): Samples of a shard.

    Returns:
        dict: For :class:`TeacherCacheWriter`.
    """
    described = zip(dataset.fingerprints, dataset.sources, describe_sources(dataset))
    sources = {}
    for name, (entry, _), description in described:
        sources.setdefault(name, {"annotation": str(entry.annotation), "fingerprint": name, "description": description})
    return {
        "teacher": weights_digest(teacher),
        "vocab_size": len(teacher.lm_head.weight),
        "top_k": top_k,
        "tokens": divergence["tokens"],
        "temperature": float(divergence["temperature"]),
        "dtype": dtype,
        "precision": precision,
        "max_length": dataset.max_length,
        "lines": len(distinct_samples(dataset)),
        "shard_samples": shard_samples,
        "sources": list(sources.values()),
    }


def distinct_samples(dataset):
    """Positions of a dataset, one for every line, however often the line is repeated or its file is named.

    Args:
        dataset (ConversationDataset): Samples.

    Returns:
        list[int]: In the order of sources, equal ones taken for one, and lines.
    """
    names = source_numbers(dataset)
    numbers = np.array([names[name] for name in dataset.fingerprints])
    samples = np.stack([numbers[dataset.index[:, 0]], dataset.index[:, 1]], axis=1)
    return np.unique(samples, axis=0, return_index=True)[1].tolist()


def source_numbers(dataset):
    """dict[str, int]: Fingerprint to number of every source, equal ones once."""
    return {name: number for number, name in enumerate(dict.fromkeys(dataset.fingerprints))}


def _shard(folder, number):
    return folder / f"shard_{number:05d}.safetensors"


def _read_manifest(folder):
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / MANIFEST} is not valid JSON: {error}") from error


def _difference(found, wanted):
    """The entries in which two sets of settings differ, as text; lists of sources are shown by their annotations."""
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    return tuple(
        ", ".join(f"{key} {_shown(settings[key])}" for key in keys if key in settings) for settings in (found, wanted)
    )


def _shown(value):
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [f"{entry['annotation']} ({entry['fingerprint'][:8]})" for entry in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:99] + "…"
