"""COCO captions: CIDEr and, where pycocoevalcap can be imported, BLEU, ROUGE-L, METEOR and SPICE.

``reference`` is pycocoevalcap's own way, whose tokenizer of the Penn Treebank, METEOR and SPICE are Java programs;
where package or Java is not there, and always in ``robust``, captions are split into words without them, and every
score so made says so in its name, as its value is another one. CIDEr itself never needs Java.
"""

import importlib.util
import math
import re
import shutil
from collections import Counter
from pathlib import Path

from .common import check, report

WITHOUT = "no PTB tokenizer"
LONGEST, SIGMA, SCALE = 4, 6.0, 10.0  # CIDEr-D: words of an n-gram, width of the length penalty, top of the scale
_WORD = re.compile(r"\w+(?:'\w+)?")


def words(caption):
    """str: Lower-case words with single blanks between them."""
    return " ".join(_WORD.findall(caption.lower()))


def mark(rows, mode):
    """list[tuple]: The words of every row, and its own CIDEr (no PTB tokenizer), from 0 to 10."""
    said = [None if row["prediction"] is None else words(row["prediction"]) for row in rows]
    scores = cider([text or "" for text in said], [[words(text) for text in row["gold"]] for row in rows])
    return list(zip(said, scores))


def cider(captions, references):
    """CIDEr-D of every caption.

    Source: Vedantam, Lawrence Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015),
    equations 1 to 3 and 10. A caption is, for n = 1..4, the vector of its n-gram counts times log(images / images whose
    references have the n-gram). Against one reference it scores, averaged over n, the cosine of the two, with the
    caption's entries clipped to the reference's, times exp(-d^2 / 2 sigma^2) for a difference d in length; the mean
    over references times 10. As in the public implementation, lengths are numbers of 2-grams.

    Args:
        captions (list[str]): One for each image, words with blanks between them.
        references (list[list[str]]): Of each image.

    Returns:
        list[float]: From 0 to 10.
    """
    counts = [[_ngrams(text) for text in texts] for texts in references]
    images = Counter(ngram for texts in counts for ngram in set().union(*texts))
    log_images = math.log(len(references))

    def vectors(found):
        parts = [{} for _ in range(LONGEST)]
        for ngram, count in found.items():
            parts[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, images[ngram])))
        norms = [math.sqrt(sum(value**2 for value in part.values())) for part in parts]
        return parts, norms, sum(count for ngram, count in found.items() if len(ngram) == 2)

    scores = []
    for caption, texts in zip(captions, counts, strict=True):
        said, said_norms, said_length = vectors(_ngrams(caption))
        total = 0.0
        for text in texts:
            true, true_norms, true_length = vectors(text)
            penalty = math.exp(-((said_length - true_length) ** 2) / (2 * SIGMA**2))
            for n in range(LONGEST):
                shared = sum(min(value, true[n].get(k, 0)) * true[n].get(k, 0) for k, value in said[n].items())
                norm = said_norms[n] * true_norms[n]
                total += (shared / norm if norm else shared) * penalty
        scores.append(SCALE * total / LONGEST / len(texts))
    return scores


def _ngrams(text):
    text = text.split()
    return Counter(tuple(text[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(text) - n + 1))


def score(rows, mode="robust", strict=False):
    """Score captions.

    Args:
        rows (list[dict]): Result rows; gold is the list of an image's captions. How rare words are is taken from the
            rows, so that a part of a benchmark scores otherwise than as a part of the whole.
        mode (str): ``reference`` or ``robust``.
        strict (bool): Raise when an answer is missing; it is an empty caption otherwise.

    Returns:
        dict: See :func:`report`; scores times 100, as papers print them. ``tools`` says what was there.
    """
    check(rows, mode, strict)
    marks = mark(rows, mode)
    package = importlib.util.find_spec("pycocoevalcap") is not None
    java = shutil.which("java") is not None
    scores = {f"CIDEr ({WITHOUT})": sum(value for _, value in marks) / len(marks) * 100}
    if package:
        scores = _pycocoevalcap(rows, java and mode == "reference")
    headline = next(name for name in scores if name.startswith("CIDEr"))
    length = sum(len((row["prediction"] or "").split()) for row in rows) / len(rows)
    tools = {"pycocoevalcap": package, "java": java}
    return report(mode, rows, marks, headline, scores, average_words=length, tools=tools)


def _pycocoevalcap(rows, java):
    import pycocoevalcap
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    # Other blanks than plain ones are line ends to Java, and half a character cannot be sent there.
    gold = {i: [_plain(text) for text in row["gold"]] for i, row in enumerate(rows)}
    said = {i: [_plain(row["prediction"] or "")] for i, row in enumerate(rows)}
    if java:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        gold, said = (
            PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in part.items()})
            for part in (gold, said)
        )
    else:
        gold, said = ({i: [words(text) for text in texts] for i, texts in part.items()} for part in (gold, said))
    bleu = Bleu(LONGEST).compute_score(gold, said, verbose=0)[0]
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
    scores["ROUGE-L"] = Rouge().compute_score(gold, said)[0]
    scores["CIDEr"] = Cider().compute_score(gold, said)[0]
    if not java:
        return {f"{name} ({WITHOUT})": float(value) * 100 for name, value in scores.items()}
    from pycocoevalcap.meteor.meteor import Meteor

    scores["METEOR"] = Meteor().compute_score(gold, said)[0]
    # SPICE fetches its parser from the network when it is not there.
    if list((Path(pycocoevalcap.__path__[0]) / "spice" / "lib").glob("stanford-corenlp-*.jar")):
        from pycocoevalcap.spice.spice import Spice

        scores["SPICE"] = Spice().compute_score(gold, said)[0]
    return {name: float(value) * 100 for name, value in scores.items()}


def _plain(text):
    return " ".join(text.encode("utf-8", "replace").decode().split())
