"""Fixtures shared by the tests of Tr((AB)^(1/2)) and of the Frechet distance."""

import warnings

import pytest


@pytest.fixture
def warnings_are_failures():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
