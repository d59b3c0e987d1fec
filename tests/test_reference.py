"""Documents that are generated are up to date."""

import pytest

from cli.reference import DOCUMENTS, ROOT


@pytest.mark.parametrize("name", list(DOCUMENTS))
def test_a_generated_document_says_what_the_code_says(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == DOCUMENTS[name](), f"{name} is stale: run `make docs`"
