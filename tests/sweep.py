"""Sweeps over many cases, of which the default selection runs the first few and the slow one the rest."""

import pytest


def sweep(names, values, *, quick, **options):
    """`pytest.mark.parametrize` whose cases after the first `quick` are marked slow."""
    cases = []
    for index, value in enumerate(values):
        marks = [pytest.mark.slow] if index >= quick else []
        cases.append(pytest.param(*([value] if isinstance(names, str) else value), marks=marks))
    return pytest.mark.parametrize(names, cases, **options)
