"""Text to distil a language model on: passages of documents and the teacher's own answers.

Documents and prompts are divided into training and held-out ones by a hash of their names and words, so the
division never changes.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from pathlib import Path

from ...errors import UserError
from .answers import read_prompts, sample_answers, teacher_template
from .debian import PACKAGES, debian_sources
from .documents import HELD_OUT_SHARE, Source, read_documents, share
from .folder import is_made, new_folder
from .passages import cut_passages

SPLITS = ("train", "test")


def make_text(
    out,
    teacher,
    documents=(),
    debian=(),
    prompts=None,
    answers=None,
    passage_tokens=256,
    train_tokens=400_000,
    held_out_tokens=40_000,
    max_new_tokens=160,
    seed=0,
    trust_remote_code=False,
    progress=None,
):
    """Write JSONL files of passages and answers, a meta JSON per split, and what they were made from.

    Args:
        out (str | Path): Folder to create; it appears whole or not at all. When it was made with the same
            arguments it is left alone.
        teacher (str): Model folder, or the name of a shipped model; its tokenizer measures, it answers.
        documents (Sequence[str]): Folders of .txt, .md, .rst, .html or .htm files, perhaps gzipped.
        debian (Sequence[str]): Debian packages to fetch. When neither is given, a few manuals and books.
        prompts (str, optional): File with one prompt a line; the list of this package when absent.
        answers (int, optional): Prompts to answer, held-out ones included; all when absent, 0 needs no model.
        passage_tokens (int): Tokens of a passage.
        train_tokens (int): Most tokens of training passages.
        held_out_tokens (int): Most tokens of held-out passages.
        max_new_tokens (int): Longest answer in tokens.
        seed (int): Seed of the answers; the passages do not depend on it.
        trust_remote_code (bool): Run the folder's own tokenizer code.
        progress (callable, optional): ``progress(what, total)`` gives a context whose value is called with the
            units finished.

    Returns:
        dict: ``train`` and ``test`` paths of the meta files.

    Raises:
        UserError: For arguments out of range, unreadable input, or a folder that holds something else.
    """
    for name, number, least in (
        ("passage_tokens", passage_tokens, 8),
        ("train_tokens", train_tokens, passage_tokens),
        ("held_out_tokens", held_out_tokens, passage_tokens),
        ("max_new_tokens", max_new_tokens, 1),
        ("answers", 0 if answers is None else answers, 0),
    ):
        if number < least:
            raise UserError(f"{name} is {number}, expected at least {least}")
    documents = [str(path) for path in documents]
    debian = list(debian) or ([] if documents else list(PACKAGES))
    asked = read_prompts(prompts)[:answers]
    settings = {
        "teacher": str(teacher),
        "documents": documents,
        "debian": debian,
        "prompts": hashlib.sha256("\n".join(asked).encode()).hexdigest()[:12],
        "answers": len(asked),
        "passage_tokens": passage_tokens,
        "train_tokens": train_tokens,
        "held_out_tokens": held_out_tokens,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    metas = {split: str(Path(out) / f"{split}.json") for split in SPLITS}
    if is_made(out, settings, "make-text"):
        return metas
    # Imported here: of all data only this needs a model, and reading data should not load that code.
    from ...convert.teacher import load_processor, load_teacher

    progress = progress or _no_progress
    processor = load_processor(teacher, trust_remote_code=trust_remote_code)
    with new_folder(out, settings) as folder:
        facts = {"teacher": str(teacher), "tokens": {}}
        with contextlib.ExitStack() as stack:
            sources = [Source.from_folder(path) for path in documents]
            sources += stack.enter_context(debian_sources(debian)) if debian else []
            limits = {"train": train_tokens, "test": held_out_tokens}
            _write_documents(folder, sources, processor.tokenizer, passage_tokens, limits, facts, progress)
        if asked:
            model = _to_device(load_teacher(teacher))
            _write_answers(folder, model, processor, asked, max_new_tokens, seed, facts, progress)
        for split in SPLITS:
            names = [path.stem for path in sorted(folder.glob(f"*_{split}.jsonl"), reverse=True)]
            entries = {name: _meta_entry(folder, name) for name in names}
            (folder / f"{split}.json").write_text(json.dumps(entries, indent=2), encoding="utf-8")
        (folder / "sources.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return metas


def _write_documents(folder, sources, tokenizer, passage_tokens, limits, facts, progress):
    with progress("read documents", sum(len(source.files) for source in sources)) as advance:
        documents, repeated = read_documents(sources, advance)
    # One queue per source, so that a large one does not crowd out the others.
    queues = {split: {source.name: [] for source in sources} for split in SPLITS}
    with progress("cut passages", len(documents)) as advance:
        for document in documents:
            queue = queues["test" if document.held_out else "train"][document.source]
            for number, (text, tokens) in enumerate(cut_passages(document.paragraphs, tokenizer, passage_tokens)):
                queue.append((f"{document.name}#{number}", text, tokens))
            advance(1)
    facts["sources"] = [
        {
            "name": source.name,
            "version": source.version,
            "files": len(source.files),
            "licences": _copy_licences(source, folder / "licences"),
        }
        for source in sources
    ]
    facts["repeated_documents"] = repeated
    facts["documents"] = []
    for split in SPLITS:
        chosen = _choose(list(queues[split].values()), limits[split])
        if not chosen:
            raise UserError(
                f"{len(documents)} documents give no {split} passage of {passage_tokens} tokens: "
                "expected more or longer files, or a smaller passage_tokens"
            )
        _write_lines(
            folder / f"documents_{split}.jsonl",
            ({"id": name, "category": "document", "text": text} for name, text, _ in chosen),
        )
        facts["tokens"][f"documents_{split}"] = sum(tokens for *_, tokens in chosen)
        by_document = {}
        for name, _, tokens in chosen:
            by_document.setdefault(name.rpartition("#")[0], []).append(tokens)
        for name, tokens in sorted(by_document.items()):
            entry = {"name": name, "split": split, "passages": len(tokens), "tokens": sum(tokens)}
            facts["documents"].append(entry)


def _choose(queues, limit):
    # In hash order, so that a higher limit only adds passages.
    queues = [sorted(queue, key=lambda passage: share(passage[0])) for queue in queues]
    chosen, total = [], 0
    for passage in itertools.chain.from_iterable(itertools.zip_longest(*queues)):
        if passage is None:
            continue
        total += passage[2]
        if total > limit:
            break
        chosen.append(passage)
    return chosen


def _copy_licences(source, folder):
    names = []
    for path in source.licences:
        name = f"{source.name}-{'-'.join(path.relative_to(source.folder).parts)}"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
        names.append(f"{folder.name}/{name}")
    return names


def _write_answers(folder, model, processor, prompts, max_new_tokens, seed, facts, progress):
    with progress("answer prompts", len(prompts)) as advance:
        template = teacher_template(model, processor.tokenizer)
        answers = sample_answers(model, processor, template, prompts, max_new_tokens, seed, advance)
    lines = {split: [] for split in SPLITS}
    for prompt, (answer, ended) in zip(prompts, answers):
        split = "test" if share(prompt) < HELD_OUT_SHARE else "train"
        # An answer that begins with its end teaches nothing, an image mark in it could not be read back.
        if answer and "<image>" not in answer:
            turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
            number = len(lines[split])
            item = {"id": f"answer-{split}-{number:04d}", "category": "answer", "conversations": turns}
            lines[split].append(item if ended else {**item, "end": False})
    cut_off = sum(not ended for _, ended in answers)
    facts["answers"] = {"template": template, "prompts": len(prompts), "cut_off": cut_off}
    for split in SPLITS:
        if lines[split]:
            _write_lines(folder / f"answers_{split}.jsonl", lines[split])
            answered = [item["conversations"][1]["value"] for item in lines[split]]
            facts["answers"][split] = len(answered)
            facts["tokens"][f"answers_{split}"] = sum(
                len(processor.tokenizer(answer, add_special_tokens=False).input_ids) for answer in answered
            )


def _to_device(model):
    import torch

    # Most CPUs multiply bf16 matrices no faster, and fp32 answers are the steadier ones.
    return model.to("cuda") if torch.cuda.is_available() else model.float()


def _meta_entry(folder, name):
    with open(folder / f"{name}.jsonl", "rb") as file:
        length = sum(1 for _ in file)
    return {"root": ".", "annotation": f"{name}.jsonl", "data_augment": False, "repeat_time": 1, "length": length}


def _write_lines(path, items):
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


@contextlib.contextmanager
def _no_progress(what, total):
    yield lambda units: None
