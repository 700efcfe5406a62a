"""The page of predictions is what its generator prints, and says what it is."""

import pytest

pytestmark = pytest.mark.kernels
pytest.importorskip("triton")

from triton_static.predict import PAGE, page  # noqa: E402


def test_the_page_is_up_to_date():
    """`python tests/triton_static/predict.py` writes it."""
    assert PAGE.read_text() == page()


def test_the_page_says_that_nothing_was_run():
    assert "**Predicted, not run on a GPU.**" in page()
