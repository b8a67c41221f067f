"""Sweeps over many cases, of which the default selection runs the first few and another one the rest."""

import pytest


def sweep(names, values, *, quick, rest=pytest.mark.slow, **options):
    """`pytest.mark.parametrize` whose cases after the first `quick` are marked as the rest."""
    cases = []
    for index, value in enumerate(values):
        marks = [rest] if index >= quick else []
        cases.append(pytest.param(*([value] if isinstance(names, str) else value), marks=marks))
    return pytest.mark.parametrize(names, cases, **options)
