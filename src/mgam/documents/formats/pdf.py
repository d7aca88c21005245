"""Text of PDF files, page after page."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pypdf import PdfReader
from pypdf.errors import DependencyError, PyPdfError

from mgam.errors import DocumentError

BETWEEN_PAGES = "\n\n"


def extract(data: bytes, name: str) -> str:
    """The text of a PDF, in the order of its pages.

    Raises:
        DocumentError: damaged, encrypted with a password, or made of pictures only.
    """
    with _quiet():
        try:
            reader = PdfReader(io.BytesIO(data))
            if reader.is_encrypted and not reader.decrypt(""):
                raise DocumentError(
                    f"{name} is encrypted with a password; take it off first, for instance with: "
                    f"qpdf --decrypt --password=... {name} open.pdf"
                )
            pages = [page.extract_text() for page in reader.pages]
        except DependencyError as error:
            raise DocumentError(
                f"{name} is encrypted in a way that needs a further package: pip install 'pypdf[crypto]', or decrypt "
                "the file first"
            ) from error
        except (PyPdfError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
            raise DocumentError(
                f"{name} is damaged, or no PDF ({type(error).__name__}: {error}); open it in a viewer and print it to "
                "a new PDF, or give its text"
            ) from error
    if not any(page.strip() for page in pages):
        raise DocumentError(
            f"{name} holds no text: its {len(pages)} pages are pictures; run text recognition first, for instance "
            f"with: ocrmypdf {name} readable.pdf"
        )
    return BETWEEN_PAGES.join(page.strip() for page in pages)


@contextmanager
def _quiet() -> Iterator[None]:
    """pypdf notes every oddity of a file; what matters is said in our own words."""
    logger = logging.getLogger("pypdf")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
