"""Which words of a file are running English."""

import gzip

import pytest

from xtuner_ext.data.sources.prose import is_prose, markup, read_paragraphs
from xtuner_ext.errors import UserError

FIRST = "The mill stood at the end of the valley, and its wheel was turned by the water of a small brook."
SECOND = "In spring, when the snow of the hills had melted, it could be heard from every house of the village."
THIRD = "Nobody knew who had built it, but all of them agreed that it was older than the church."

HTML = f"""<!DOCTYPE html><html><head>
<title>The mill is the title of this page, and it is not a paragraph of it.</title>
<style>p {{ color: red }}</style></head><body>
<nav><p>{THIRD}</p></nav>
<div class="sphinxsidebar"><div><p>{THIRD}</p></div></div>
<h1>The mill</h1>
<p>The mill stood at the end of the <em>valley</em>,
   and its wheel was turned by the water&nbsp;of a small br<b>oo</b>k.<a class="headerlink" href="#x">¶</a>
<p>2.1. In spring, when the snow of the hills had melted, it could be heard<br>from every house of the village. [3]</p>
<pre>The text of a listing is not the prose of a page, and it is left out of it.</pre>
<script>var text = "the code of a page is not the prose of it, and it is left out.";</script>
<ul><li>Home</li><li>Next</li><li><p>{THIRD}</li></ul>
<table><tr><td>7</td><td>8</td></tr></table>
<footer>{FIRST}</footer></body></html>"""
MARKDOWN = f"""# The mill

The mill stood at the end of the [valley](x.html), and its wheel was **turned** by
the water of a small `brook`.

```
{THIRD}
```

    {THIRD}

- In spring, when the snow of the hills had melted, it could be heard from every house of the village.
1. Nobody knew who had built it, but all of them agreed that it was older than the church.
"""
RST = f"""The mill
========

The mill stood at the end of the :ref:`valley <x>`, and its wheel was **turned** by
the water of a small ``brook``.

.. note of the author, which is a directive and
   is not read.

.. code:: text

   {THIRD}

   {SECOND}

* In spring, when the snow of the `hills <x.html>`_ had melted, it could be heard from every house of the village.

Nobody knew who had built it, but all of them agreed that it was older than the church.
"""
PLAIN = f"THE MILL\n\n{FIRST[:40]}\n   {FIRST[40:].strip()}\n\n1 2 3 4 5\n\n{SECOND}\r\n\r\n{THIRD}\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.html", HTML), ("a.htm", HTML), ("a.md", MARKDOWN), ("a.rst", RST), ("a.txt", PLAIN), ("A.TXT", PLAIN)],
)
def test_paragraphs_of_every_format(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_paragraphs(tmp_path / name) == [FIRST, SECOND, THIRD]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert read_paragraphs(tmp_path / f"{name}.gz") == [FIRST, SECOND, THIRD]


def test_html_without_optional_tags(tmp_path):
    (tmp_path / "a.html").write_text(f"<html><head><title>x</title><body><p>{FIRST}<p>{SECOND}")
    assert read_paragraphs(tmp_path / "a.html") == [FIRST, SECOND]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_encodings(tmp_path, encoding):
    text = FIRST.replace("small brook", "“naïve” brook")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read_paragraphs(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize(
    "text",
    [
        "Home | Next | Previous | Index of the manual | Contents",
        "File Edit View Insert Format Tools Table Window Help About Contents Index Search.",
        "if (node == NULL || node->next == head) { return free(node), insert(list, node, size); } else exit(1);",
        "Die Mühle stand am Ende des Tals, und ihr Rad wurde vom Wasser eines kleinen Baches gedreht, sagt man.",
        "Le moulin se trouvait au bout de la vallée, et sa roue était entraînée par les eaux d'un petit ruisseau.",
        "It is short.",
        "apple 12, banana 17, cherry 18, date 22, elder 24, fig 29, grape 31, hazel 33, iris 38, juniper 39.",
        "The list of the members of the council of the city of the lakes and the hills in the north of it",
    ],
)
def test_what_is_no_prose(text):
    assert not is_prose(text)


def test_formats_by_name(tmp_path):
    names = {"a.txt": "plain", "a.b.html.gz": "html", "README": None, "a.gz": None, "a.png": None, "a.MD": "markdown"}
    assert {name: markup(tmp_path / name) for name in names} == names


@pytest.mark.parametrize("content", [b"no gzip at all", gzip.compress(PLAIN.encode())[:-20]])
def test_damaged_gzip_is_named(tmp_path, content):
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(UserError, match="a.txt.gz is not a readable gzip file: "):
        read_paragraphs(tmp_path / "a.txt.gz")
