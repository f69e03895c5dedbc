"""The option's letter in an answer, as several evaluation kits find it, and as we do."""

import re
import string

UNKNOWN = "Z"  # VLMEvalKit's letter for answers that choose nothing
CRASH = "IndexError"  # stands for the letter where the official code stops the whole run
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SAID = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
_ALONE = re.compile(r"^\W*([A-Za-z])\W*$", re.ASCII)
_LEADING = re.compile(r"^\s*[(\[*]*([A-Z])[)\].:,*]")
_NAMED = re.compile(r"(?i:answer|option|choice|choose|select)\s*(?i:is|:)?\s*[(\[*]*([A-Z])(?!\w)")
# "A dog" and "I see" are words; "A or B" are letters.
_TOKEN = re.compile(r"(?<!\w)(?!A\s+(?!or\b|and\b)[a-z])(?!I\s+[a-z])([A-Z])(?!\w)(?!['’])")


def vlmevalkit(text, options, year=2025):
    """VLMEvalKit's ``can_infer``, without its judge and its random choice.

    Args:
        text (str): An answer.
        options (dict[str, str]): Text by letter.
        year (int): 2024 is the version that MMVM's kit has: the letter may be anywhere, "answer is B" is not looked
            for, and long answers are searched for an option's text as well.

    Returns:
        str | None: The letter, ``Z`` for a refusal, or None.
    """
    return _option(text, options, year) or _option_text(text, options, year)


def _option(text, options, year):
    if "Failed to obtain answer via API" in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return UNKNOWN
    words = text.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1:
        if year == 2024 or words.index(found[0]) > len(words) - 5:
            return found[0]
    elif not found and UNKNOWN in words:
        return UNKNOWN
    said = _SAID.search(text) if year != 2024 else None
    return said[1].upper() if said and said[1].upper() in options else None


def _option_text(text, options, year):
    text = text.lower()
    if year != 2024 and len(text) > 2 * sum(len(str(option)) for option in options.values()):
        return None
    found = [letter for letter, option in options.items() if str(option).lower() in text]
    return found[0] if len(found) == 1 else None


def xtuner(text):
    """str: XTuner's mmbench: the first run of letters from A to D, whatever it is part of; empty without one."""
    found = re.search(r"[A-D]+", text)
    return found[0] if found else ""


def internvl(text, options):
    """InternVL's ``post_process`` for ScienceQA.

    Args:
        text (str): An answer.
        options (dict[str, str]): Text by letter.

    Returns:
        str: The letter, the first option that is contained, or the answer itself; ``IndexError`` for "(" and one more
        character, where the official code stops.
    """
    text = text.strip()
    if len(text) > 1 and text[0] in options:
        return text[0]
    if len(text) > 1:
        for letter, option in options.items():
            if option in text:
                return letter
    if len(text) > 1 and text[1] == ".":
        return text[0]
    if len(text) == 2 and text[0] == "(":
        return CRASH
    if len(text) > 2 and text[0] == "(" and text[2] == ")":
        return text[1]
    return text


def llava_scienceqa(text):
    """str: LLaVA's reading for ScienceQA: the letter alone, "A. ...", or one "The answer is A."; else ``FAILED``."""
    if text in tuple("ABCDE"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else "FAILED"


def strict_letter(text, options):
    """The letter that an answer means; never a guess.

    In turn: the letter alone, in either case; a letter in front with a bracket, stop, colon or comma; the last that
    is called answer, option or choice; the only one that stands alone, but for "A" and "I" as words;
    the only option whose whole text is said, the longest where one is part of another.

    Args:
        text (str): An answer.
        options (dict[str, str]): Text by letter.

    Returns:
        str | None: The letter, or None.
    """
    text = text.strip()
    if (found := _ALONE.match(text)) and found[1].upper() in options:
        return found[1].upper()
    if (found := _LEADING.match(text)) and found[1] in options:
        return found[1]
    if named := [letter for letter in _NAMED.findall(text) if letter in options]:
        return named[-1]
    alone = {letter for letter in _TOKEN.findall(text) if letter in options}
    if len(alone) == 1:
        return alone.pop()
    return _said_option(text, options) if not alone else None


def _said_option(text, options):
    text = " ".join(text.lower().split())
    said = {}
    for letter, option in options.items():
        option = " ".join(str(option).lower().split()).removesuffix(".")
        if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text):
            said[letter] = option
    whole = [a for a in said if not any(said[a] != said[b] and said[a] in said[b] for b in said)]
    return whole[0] if len(whole) == 1 else None


def parse_options(text):
    """Options that stand as lines.

    Args:
        text (str): Lines such as ``A. dog``.

    Returns:
        dict[str, str]: Text by letter.
    """
    pairs = (line.split(".", 1) for line in text.splitlines() if "." in line)
    return {key.strip(): value.strip() for key, value in pairs if key.strip() in tuple(string.ascii_uppercase)}
