"""What samples follow from, so that a thing computed from them is used for no others.

Images count by their names in the annotations only: to read them all would cost what is to be saved.
"""

import dataclasses
import hashlib
import json


def describe_sources(dataset):
    """Say what the samples of every source of a dataset follow from.

    Args:
        dataset (ConversationDataset): Samples.

    Returns:
        list[dict]: Per source, a digest of its annotations, its tile limit, what its videos' frames and its images'
        changes are drawn by if it has any, which root it is where one annotation file has several, and the
        processor's, the template's and the tokenizer's settings; all as JSON can hold it.
    """
    tokenizer = dataset.processor.tokenizer
    if tokenizer.is_fast:
        words = tokenizer.backend_tokenizer.to_str()
    else:
        words = json.dumps([repr(tokenizer), sorted(tokenizer.get_vocab().items()), tokenizer("").input_ids])
    shared = {
        **{f"processor.{key}": value for key, value in dataset.processor.settings.items()},
        **{f"template.{key}": value for key, value in dataclasses.asdict(dataset.template).items()},
        "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
    }
    own, roots = [], {}
    for entry, annotations in dataset.sources:
        own.append({"annotations": annotations.digest, "max_dynamic_patch": entry.max_dynamic_patch})
        if annotations.has_video:
            own[-1]["frames"] = {**dataclasses.asdict(dataset.frames), "seed": dataset.seed}
        if entry.augment:
            own[-1]["augment"] = dataset.seed
        # The same lines over other images.
        root, known = entry.root.resolve(), roots.setdefault(json.dumps(own[-1]), [])
        if root not in known:
            known.append(root)
        if number := known.index(root):
            own[-1]["root"] = number
    # Through JSON, which has no tuples, so that a description equals itself read from a file.
    return [json.loads(json.dumps({**source, **shared})) for source in own]


def fingerprint(description):
    """str: Short name of a description, the same wherever and whenever it is made."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
