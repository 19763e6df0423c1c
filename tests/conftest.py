"""For all tests: what one of them does to the process must not reach the next."""

import locale

import pytest


@pytest.fixture(autouse=True)
def same_locale():
    """Writers of SimpleITK reset the locale, after which open() takes text for ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)
