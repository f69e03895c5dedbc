"""MMVM: which of the numbered objects in the second image is the marked one of the first, by 8 kinds of match.

As multiple choice: ``reference`` finds letters as MMVM's kit without its judge and without its random choice, where it
then has Z; ``robust`` as :func:`strict_letter`, after which a number alone, or the only one that is said, names the
option with that number. The newer variant, whose answer is the number itself, is scored by :func:`score_number`.
"""

import ast
import re

from . import letters
from .common import by_name, check, each, percent, report

KINDS = ("CL", "SP", "TM", "SZ", "RP", "OO", "BR", "OM")  # match types 1 to 8
UNREADABLE, UNKNOWN_KIND = ["CL", "RP"], "SP"  # what the official kit takes for a broken list and for another number


def match_kinds(text):
    """list[str]: The kinds that a case is of, from ``[1, 5]``."""
    try:
        found = ast.literal_eval(str(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return UNREADABLE
    found = found if isinstance(found, (list, tuple)) else [found]
    return [KINDS[number - 1] if number in range(1, 9) else UNKNOWN_KIND for number in found]


def mark(rows, mode):
    """list[tuple]: The letter of every row, and whether it is right."""
    return each(rows, lambda row: _mark(row, mode))


def _mark(row, mode):
    options = row["meta"]["options"]
    if mode == "reference":
        parsed = letters.vlmevalkit(row["prediction"], options, 2024) or letters.UNKNOWN
    else:
        parsed = letters.strict_letter(row["prediction"], _words(options)) or _by_number(row["prediction"], options)
    return parsed, parsed == row["gold"]


def _words(options):
    """dict[str, str]: Options without the text of numbers, which prose is full of."""
    return {letter: "" if text.isdecimal() else text for letter, text in options.items()}


def _by_number(text, options):
    number = said_number(text)
    found = [letter for letter, option in options.items() if number is not None and option == str(number)]
    return found[0] if len(found) == 1 else None


def said_number(text):
    """int | None: The only whole number that is said; one after "answer", "object" or "number" goes first."""
    named = re.findall(r"(?i)(?:answer|object|number|id)\W*(?:is\W*)?(?:number\W*|object\W*)?(\d{1,9})\b", text)
    every = re.findall(r"(?<![\w.-])(\d{1,9})(?!\w|\.\d)", text)
    for found in (named, every):
        if len({int(number) for number in found}) == 1:
            return int(found[0])
    return None


def score(rows, mode="robust", strict=False):
    """Score MMVM as multiple choice.

    Args:
        rows (list[dict]): Result rows; gold is a letter, meta holds ``options`` and ``match_type``, a list as text.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing.

    Returns:
        dict: See :func:`report`; a case counts in every kind that it is of.
    """
    check(rows, mode, strict)
    return _report(rows, mode, mark(rows, mode))


def mark_number(rows, mode):
    """list[tuple]: The number of every row, and whether it is right."""
    return each(rows, lambda row: _mark_number(row, mode))


def _mark_number(row, mode):
    text = row["prediction"].strip()
    if mode == "reference":
        return text, text == str(row["gold"])
    parsed = said_number(text)
    return parsed, str(parsed) == str(row["gold"])


def score_number(rows, mode="robust", strict=False):
    """Score the variant of MMVM that asks for the object's number.

    Its official scorer is a judge. Without one, ``reference`` wants the number and nothing else, and ``robust`` the
    only number that is said.

    Args:
        rows (list[dict]): Result rows; gold is a number as text, meta holds ``match_type``.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing.

    Returns:
        dict: See :func:`report`.
    """
    check(rows, mode, strict)
    return _report(rows, mode, mark_number(rows, mode))


def _report(rows, mode, marks):
    right = [correct for _, correct in marks]
    kinds = by_name([match_kinds(row["meta"].get("match_type")) for row in rows], right)
    kinds = {kind: kinds[kind] for kind in KINDS if kind in kinds}
    return report(mode, rows, marks, "overall", {"overall": percent(right)}, {"match": kinds})
