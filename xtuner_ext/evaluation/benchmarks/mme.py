"""MME's files."""

from ...errors import UserError
from ..scorers import mme as scorer
from .base import SHORT, Benchmark, question
from .files import read_lines, take

TASKS = (*scorer.PERCEPTION, *scorer.COGNITION)
RELEASE = "MME_Benchmark_release_version"
ORDER = "Please answer yes or no."


def _read(folder, split):
    if folder.file:
        return _task(folder, folder.file, folder.root)
    results = folder.find("Your_Results", "eval_tool/Your_Results")
    if results is not None:
        files = [path for task in TASKS if (path := results / f"{task}.txt").is_file()]
        return [found for path in files for found in _task(folder, path, results)]
    release = folder.find(RELEASE) or folder.root
    if not any((release / task).is_dir() for task in TASKS):
        folder.need(f"Your_Results, {RELEASE}")
    asked = folder.find("llava_mme.jsonl")
    gold = {task: _release(release / task) for task in TASKS if (release / task).is_dir()}
    if asked is not None:
        return [_llava(folder, where, item, gold) for where, item in read_lines(asked)]
    return [
        _question(task, image, text, answer, where, folder.image(f"{task}/{path}", (RELEASE,), where))
        for task, pairs in gold.items()
        for image, text, path, answer, where in pairs
    ]


def _task(folder, path, root):
    """list[dict]: Of a file with lines of image, question and answer, named after its subtask."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            where, cells = f"{path}:{number}", line.strip().split("\t")
            if len(cells) not in (3, 4):
                raise UserError(
                    f"{where}: has {len(cells)} cells, expected image, question and answer with tabs between"
                )
            image = folder.image(f"{path.stem}/{cells[0]}", (RELEASE, f"../{RELEASE}"), where)
            found.append(_question(path.stem, cells[0], *cells[1:3], where, image))
    if not found:
        raise UserError(f"{path} is empty, expected lines of image, question and answer with tabs between")
    return found


def _release(task):
    """list[tuple]: Image name, question, image path below the task, answer, where; with or without subfolders."""
    texts = task / "questions_answers_YN" if (task / "questions_answers_YN").is_dir() else task
    folder = "images/" if (task / "images").is_dir() else ""
    pictures = {path.stem: path.name for path in sorted((task / folder).iterdir()) if path.suffix != ".txt"}
    found = []
    for path in sorted(texts.glob("*.txt")):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                cells, where = line.strip().split("\t"), f"{path}:{number}"
                if len(cells) != 2 or path.stem not in pictures:
                    raise UserError(
                        f"{where}: expected question and answer with a tab between, and an image {path.stem}"
                    )
                found.append((pictures[path.stem], cells[0], folder + pictures[path.stem], cells[1], where))
    return found


def _llava(folder, where, item, gold):
    task, text = take(item, where, "category"), take(item, where, "text")
    image = take(item, where, "image")
    plain = text.replace(SHORT, "").strip()
    plain = plain if ORDER in plain else f"{plain} {ORDER}"
    key = image.split("/")[-1], plain
    found = next((entry for entry in gold.get(task, ()) if entry[:2] == key), None)
    if found is None:
        raise UserError(f"{where}: {plain!r} on {image} is not in {RELEASE}/{task}")
    asked = _question(task, *key, found[3], where, folder.image(f"{task}/{found[2]}", (RELEASE,), where))
    return {**asked, "turns": [(f"<image>\n{text.strip()}", None)]}


def _question(task, image, text, answer, where, path):
    if answer.lower() not in ("yes", "no"):
        raise UserError(f"{where}: answer is {answer!r}, expected Yes or No")
    # The files give no ids, or one to both questions of an image.
    number = f"{task}/{image}/{where.rsplit(':', 1)[-1]}"
    return question(number, f"<image>\n{text} {SHORT}", [path], answer, where, task, image=image, question=text)


MME = Benchmark(
    name="mme",
    reader=_read,
    marker=scorer.mark,
    scorer=scorer.score,
    settings={"max_new_tokens": 20, "min_new_tokens": 1, "max_tiles": 6},
    files=(
        f"{RELEASE}/ with a folder for each of the 14 subtasks (images beside texts, or in images/ and "
        "questions_answers_YN/)",
        "optional: Your_Results/ of the evaluation tool with existence.txt and so on, whose order of lines is kept, or "
        "llava_mme.jsonl",
    ),
    splits=("test",),
    subfolders=("mme", "MME"),
)
