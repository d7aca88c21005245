"""Markdown, HTML and PDF: which text is taken out of them, and what is said when there is none to be had."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from mgam.documents.sources import Source, read_source
from mgam.errors import DocumentError

pypdf = pytest.importorskip("pypdf")
pytest.importorskip("bs4")
pytest.importorskip("markdown_it")

MARKDOWN = """# The *old* harbour

The keeper is [Ada](https://example.org/ada "a link"), `since` 1912.
She likes ![a red lamp](lamp.png).

- first
- second
  with more

1. one

   and a half
2. two

| ship | year |
|---|---|
| Argo | 1901 |
| Beagle | 1820 |

```python
if True:
    pass
```

<div>left out</div>

> last &amp; least
"""

HTML = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>Harbour &amp; Sea</title>
<style>p {color: red}</style><script>let x = "<p>no</p>";</script></head>
<body><!-- nothing --><h1>The   old
harbour</h1><p>The keeper is <b>Ada</b>,<br>since 1912.</p><ul><li>first</li><li>second</li></ul>
<table><tr><th>ship</th><th>year</th></tr><tr><td>Argo</td><td>1901</td></tr></table>
<pre>if True:
    pass</pre>after<div>one<div>two</div></div></body></html>"""


def written(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DocumentError) as caught:
        read_source(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def pdf(pages: list[str], password: str | None = None, owner: str | None = None) -> bytes:
    """A PDF with a line of text on each page."""
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    names = {NameObject(key): NameObject(value) for key, value in font.items()}
    for text in pages:
        page = writer.add_blank_page(300, 200)
        if not text:
            continue
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(DictionaryObject(names))})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    if password is not None:
        writer.encrypt(password, owner, algorithm="RC4-128")
    data = io.BytesIO()
    writer.write(data)
    return data.getvalue()


def test_markdown(tmp_path: Path) -> None:
    text = read_source(written(tmp_path, "notes.md", MARKDOWN)).text
    assert text == (
        "The old harbour\n\nThe keeper is Ada, since 1912.\nShe likes a red lamp.\n\nfirst\nsecond\nwith more\n\n"
        "one\nand a half\ntwo\n\nship\tyear\nArgo\t1901\nBeagle\t1820\n\nif True:\n    pass\n\nlast & least\n"
    )


def test_html(tmp_path: Path) -> None:
    text = read_source(written(tmp_path, "page.HTML", HTML)).text
    assert text == (
        "Harbour & Sea\n\nThe old harbour\n\nThe keeper is Ada,\nsince 1912.\n\nfirst\nsecond\n\n"
        "ship\tyear\nArgo\t1901\n\nif True:\n    pass\n\nafter\none\ntwo\n"
    )


def test_html_in_the_encoding_that_it_declares(tmp_path: Path) -> None:
    page = '<html><head><meta charset="{}"></head><body>Fähre, 5 €</body></html>'
    for declared, encoding in {
        "windows-1252": "cp1252",
        "utf-8": "utf-8",
        "no-such": "utf-8",
        "rot13": "utf-8",
    }.items():
        path = written(tmp_path, "page.htm", page.format(declared).encode(encoding))
        assert read_source(path).text == "Fähre, 5 €\n", declared
    assert "not valid UTF-8" in refusal(written(tmp_path, "page.htm", page.format("utf-8").encode("cp1252")))


def test_html_that_is_nested_deeply(tmp_path: Path) -> None:
    page = "<div>" * 3_000 + "deep" + "</div>" * 3_000
    assert read_source(written(tmp_path, "deep.html", page)).text == "deep\n"


def test_pdf(tmp_path: Path) -> None:
    data = pdf(["The keeper is Ada.", "", "Since 1912."])
    for name in ("book.pdf", "book.txt", "book"):  # known by its first bytes
        source = read_source(written(tmp_path, name, data))
        assert source == Source(str(tmp_path / name), "The keeper is Ada.\n\n\n\nSince 1912.")


def test_pdf_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pdf(["piped"]))))
    assert read_source("-") == Source("<stdin>", "piped")


def test_pdf_that_is_encrypted(tmp_path: Path) -> None:
    assert "encrypted with a password" in refusal(written(tmp_path, "book.pdf", pdf(["secret"], "word")))
    open_to_all = pdf(["for all to read"], "", "owner")  # a viewer opens these without asking
    assert read_source(written(tmp_path, "open.pdf", open_to_all)).text == "for all to read"


def test_pdf_that_is_encrypted_in_a_way_that_needs_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decrypt(*_: object) -> None:
        raise pypdf.errors.DependencyError("cryptography>=3.1 is required for AES algorithm")

    path = written(tmp_path, "book.pdf", pdf(["for all"], "", "owner"))
    monkeypatch.setattr(pypdf.PdfReader, "decrypt", decrypt)
    assert "pip install 'pypdf[crypto]'" in refusal(path)


def test_pdf_without_text_or_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "its 2 pages are pictures" in refusal(written(tmp_path, "scan.pdf", pdf(["", ""])))
    whole = pdf(["a line"])
    for cut in (len(whole) // 4, len(whole) // 2):
        message = refusal(written(tmp_path, "cut.pdf", whole[:cut]))
        assert "damaged" in message or "holds no text" in message
    assert "damaged" in refusal(written(tmp_path, "not.pdf", b"%PDF-1.7 and nothing more"))
    assert not caplog.records


@pytest.mark.parametrize("name", ["empty.md", "empty.html", "empty.pdf"])
def test_empty(tmp_path: Path, name: str) -> None:
    assert "is empty" in refusal(written(tmp_path, name, b""))


@pytest.mark.parametrize(
    ("name", "text"), [("blank.html", "<p> </p>"), ("blank.md", "<!-- no words -->"), ("plain.html", " ")]
)
def test_no_text(tmp_path: Path, name: str, text: str) -> None:
    message = refusal(written(tmp_path, name, text))
    assert "holds no text" in message or "white space only" in message


def test_a_pdf_by_name_only_is_damaged(tmp_path: Path) -> None:
    assert "damaged" in refusal(written(tmp_path, "letter.pdf", "just a letter"))


@pytest.mark.parametrize(
    ("name", "package", "module", "data"),
    [
        ("notes.md", "markdown_it", "markdown", b"# A"),
        ("page.html", "bs4", "html", b"<p>A"),
        ("book.pdf", "pypdf", "pdf", pdf(["A"])),
    ],
)
def test_a_reader_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, module: str, data: bytes
) -> None:
    monkeypatch.delitem(sys.modules, f"mgam.documents.formats.{module}", raising=False)
    for there in [there for there in sys.modules if there.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, there)
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(written(tmp_path, name, data))
    assert "pip install 'mgam[documents]'" in message
    assert read_source(written(tmp_path, "plain.txt", "needs none")).text == "needs none"
