"""For all tests: what one of them does to the process must not reach the next."""

import locale
import os

import pytest

# Runs that are compared bit for bit, processes that share no GPU, times: all but tests/test_cuda.py
# is about the CPU.
if not os.environ.get("ON_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def same_locale():
    """Writers of SimpleITK reset the locale, after which open() takes text for ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)
