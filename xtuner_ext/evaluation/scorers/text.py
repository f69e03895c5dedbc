"""Text as the benchmarks' scorers compare it."""

import re

# The rules of the EvalAI server for visual question answering, as in its public answer processor. Spellings that its
# own earlier steps make impossible (capitals, a comma, 's) are left out.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The server means "no digit before", but says "no '<=' and digit here", so that this drops every stop before no digit.
_STOP = re.compile(r"\.(?!\d)")
_STOPS_DROPPED = 32  # the server passes a flag, whose value is 32, where the number of replacements belongs
_NUMBERS = {
    "none": "0",
    **{word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())},
}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't
    itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've
    mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock
    oughtnt:oughtn't 'ows'at:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've
    shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
    someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
    somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll
    thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's
    theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas
    wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's
    whatve:what've whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've
    who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
    wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll
    y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
    you'dve:you'd've youll:you'll youre:you're youve:you've
    """.split()
)
_NO = {"no", "not", "none", "isn't", "aren't", "doesn't", "don't", "否", "不是", "false"}
_UNSURE = re.compile(r"\bnot (?:sure|certain|clear)\b")
_YES = {"yes", "是", "true"}
_LEAD = re.compile(r"^\W*(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|:)\s*:?\s*", re.IGNORECASE)


def evalai(text):
    """The form in which EvalAI compares two answers.

    Args:
        text (str): An answer.

    Returns:
        str: Lower case, without articles and most punctuation, numbers up to ten as digits, with apostrophes.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _plain_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _plain_punctuation(text):
    """str: A text without punctuation: dropped beside a blank, a blank within a word, kept in 1.5."""
    found = text
    for mark in _PUNCTUATION:
        found = found.replace(mark, "" if mark + " " in text or " " + mark in text else " ")
    return _STOP.sub("", found, count=_STOPS_DROPPED)


def first_line(text):
    """str: The first line that says something, without "The answer is"."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return _LEAD.sub("", line).strip()


def yes_or_no(text):
    """Understand a yes or a no.

    Args:
        text (str): An answer.

    Returns:
        str | None: ``yes`` or ``no``: the first word, or the only one of the two that is said.
    """
    text = _UNSURE.sub("", first_line(text).lower().replace("’", "'"))
    if not text.isascii():
        text = re.sub("(不是|是|否)", r" \1 ", text)
    words = re.findall(r"\w+(?:'\w+)*", text)
    said = ["yes" if word in _YES else "no" for word in words if word in _YES or word in _NO]
    if said and (len(set(said)) == 1 or words[0] in _YES | _NO):
        return said[0]
    return None
