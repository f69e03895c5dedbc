"""Result rows, one a question: ``{id, question, prompt, prediction, parsed, gold, correct, category, meta}``."""

import json
import random

from ..errors import UserError

# Names of a question's id and of its answer in the rows of this package, InternVL's kit and LLaVA's.
IDS = ("id", "question_id", "questionId")
ANSWERS = ("prediction", "answer", "text")


def result_row(question, prompt, prediction):
    """Make the row of a question, not marked yet.

    Args:
        question (dict): From :func:`read_questions` or :meth:`Benchmark.read`.
        prompt (str | None): What was asked, with one placeholder an image.
        prediction (str | None): The answer; None where there is none.

    Returns:
        dict: The row; its meta says where the question is from.
    """
    return {
        "id": question["id"],
        "question": question["turns"][-1][0],
        "prompt": prompt,
        "prediction": prediction,
        "parsed": None,
        "gold": question["gold"],
        "correct": False,
        "category": question["category"],
        "meta": {"source": question["where"], **question.get("meta", {})},
    }


def write_rows(path, rows):
    """Write rows as JSONL.

    Args:
        path (Path): File to write.
        rows (list[dict]): Rows.
    """
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def read_predictions(path, questions):
    """Answers that another program may have written, with the questions that they answer.

    Args:
        path (str | Path): JSONL or JSON list of rows of this package, of InternVL's kit, or of LLaVA's.
        questions (list[dict]): From :meth:`Benchmark.read`.

    Returns:
        list[dict]: Result rows that are not marked yet; a question without an answer has none.

    Raises:
        UserError: For a broken file, or a row without id or answer, or of no question.
    """
    from .benchmarks.files import read_lines, take

    known, rows = {str(question["id"]): question for question in questions}, []
    for where, item in read_lines(path):
        key, text = take(item, where, *IDS), take(item, where, *ANSWERS)
        if str(key) not in known:
            raise UserError(f"{where}: id {key!r} is that of no question")
        if text is not None:
            # What is half of a character cannot be written again.
            text = str(text).encode("utf-8", "replace").decode()
            rows.append(result_row(known[str(key)], item.get("prompt"), text))
    return rows


def choose(questions, limit=None, seed=None):
    """Take a part of the questions.

    Args:
        questions (list[dict]): All of them.
        limit (int, optional): How many; all when absent.
        seed (int, optional): Draws them, in their order; the first ones when absent.

    Returns:
        list[dict]: The chosen questions.
    """
    if limit is None or limit >= len(questions):
        return questions
    if seed is None:
        return questions[:limit]
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]
