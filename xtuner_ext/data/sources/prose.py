"""Running English text out of plain, Markdown, reStructuredText and HTML files."""

import gzip
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

from ...errors import UserError

MARKUP = {".txt": "plain", ".md": "markdown", ".rst": "rst", ".html": "html", ".htm": "html"}

# Elements that hold no running text; menus are also told by the words of their class, role or id.
DROPPED = {"script", "style", "nav", "pre", "head", "header", "footer", "aside", "form", "button", "select", "svg", "math"}
MENUS = {"navigation", "navheader", "navfooter", "docnav", "toc", "sphinxsidebar", "related", "headerlink", "footer"}
INLINE = set(
    "a abbr acronym b bdi bdo big br cite code data del dfn em font i img ins kbd label mark q s samp small span strong sub "
    "sup time tt u var wbr".split()
)
VOID = set("area base br col embed hr img input link meta source track wbr".split())

# Words that make up close to half of running English and little of menus, listings and other languages.
FUNCTION_WORDS = set(
    "the of and to in is that it for as with be on are this by an or from not you can which have if at will was has but "
    "they we all may your when their there one more its so these than been would do about other only no some such into "
    "use used any also must should his he she were had who what how because then them our".split()
)
FUNCTION_WORD_SHARE = 0.28
SHORTEST_PARAGRAPH = 12  # words
# Of sections in front and of footnotes anywhere.
NUMBERS = re.compile(r"^(?:\d+\.)+\d* +(?=[A-Z])| ?\[\d+\]")


def read_paragraphs(path):
    """Read the prose of one file.

    Args:
        path (Path): Text, Markdown, reStructuredText or HTML; ``.gz`` behind the suffix is unpacked.

    Returns:
        list[str]: Paragraphs of running English, each one line; headings, menus, listings, tables of
        contents and other languages are left out.

    Raises:
        UserError: For a damaged ``.gz`` file.
    """
    raw = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is not a readable gzip file: {error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        # The other encoding of old English documents; it accepts any byte.
        text = raw.decode("cp1252", errors="replace")
    found = _READERS[markup(path)](text.replace("\r\n", "\n"))
    paragraphs = (NUMBERS.sub("", " ".join(block.split())) for block in found)
    return [paragraph for paragraph in paragraphs if is_prose(paragraph)]


def markup(path):
    """str | None: The format that a file name tells, None for one that is not read."""
    return MARKUP.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def is_prose(paragraph):
    """bool: Whether a paragraph is running English: enough words, the usual share of function words, a full stop."""
    words = re.findall(r"[a-z]+(?:['’][a-z]+)?", paragraph.lower())
    if len(words) < SHORTEST_PARAGRAPH or not re.search(r"[.!?:][\"'”’)\]]*$", paragraph):
        return False
    letters = sum(character.isalpha() and character.isascii() for character in paragraph)
    return (
        sum(word in FUNCTION_WORDS for word in words) >= FUNCTION_WORD_SHARE * len(words)
        and letters >= 0.75 * len(paragraph.replace(" ", ""))
    )


class _Paragraphs(HTMLParser):
    """Collects the text between block elements."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks = [""]
        self._dropped, self._depth = None, 0

    def handle_starttag(self, tag, attrs):
        if tag == "body":
            # The end of the head may be left out.
            self._dropped = None
        if self._dropped is not None:
            # Only the dropped element's own name is counted, so unclosed tags within do no harm.
            self._depth += tag == self._dropped
            return
        if tag not in VOID and (tag in DROPPED or self._is_menu(attrs)):
            self._dropped, self._depth = tag, 1
        if tag == "br":
            self.blocks[-1] += " "
        if tag not in INLINE:
            self.blocks.append("")

    def handle_endtag(self, tag):
        if self._dropped is not None:
            self._depth -= tag == self._dropped
            if self._depth == 0:
                self._dropped = None
        elif tag not in INLINE:
            self.blocks.append("")

    def handle_data(self, data):
        if self._dropped is None:
            self.blocks[-1] += data

    @staticmethod
    def _is_menu(attrs):
        return any(MENUS & set((value or "").lower().split()) for key, value in attrs if key in ("class", "id", "role"))


def _html(text):
    parser = _Paragraphs()
    parser.feed(text)
    parser.close()
    return parser.blocks


def _plain(text):
    return re.split(r"\n\s*\n", text)


def _markdown(text):
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    text = re.sub(r"^\s*(#+|[-*+]|\d+\.|>)\s+", "\n\n", text, flags=re.M)
    text = re.sub(r"\*\*|__|`", "", text)
    text = re.sub(r"!?\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    # Four spaces make a listing, unless they go on with a list.
    blocks = [block for block in _plain(text) if not re.match(r"\n*( {4}|\t)", block)]
    return _html("".join(f"<p>{block}</p>" for block in blocks))


def _rst(text):
    blocks, listing = [], None
    for block in _plain(text):
        block = block.strip("\n")
        indent = len(block) - len(block.lstrip())
        if listing is not None and indent > listing:
            continue
        # A paragraph that ends in two colons is followed by a listing, a directive by what it takes.
        directive = re.match(r"\s*\.\. ", block)
        listing = indent if directive or block.endswith("::") else None
        if not directive:
            blocks.append(re.sub(r"^\s*([-*+#]|\d+\.|#\.) ", "", block))
    text = "\n\n".join(blocks)
    text = re.sub(r":[\w:+-]+:`~?!?([^`<]*?)\s*(<[^`]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`]*>`_+", r"\1", text)
    text = re.sub(r"\|(\w+)\|", r"\1", text.replace("::\n", ":\n"))
    text = re.sub(r"::$", ":", text, flags=re.M)
    return _plain(re.sub(r"`+_*|\*\*", "", text))


_READERS = {"plain": _plain, "markdown": _markdown, "rst": _rst, "html": _html}
