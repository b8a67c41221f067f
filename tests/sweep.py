"""Sweeps over many cases: the default selection runs the first few, the slow one the next, and the long one the rest.

A case that is slow by one sweep or by its test, and long by another sweep, is a long one.
"""

import pytest


def sweep(names, values, *, quick, slow=1, **options):
    """`pytest.mark.parametrize` whose cases after the first `quick` are slow, and after `slow` more ones long."""
    cases = []
    for index, value in enumerate(values):
        late = pytest.mark.slow if index < quick + slow else pytest.mark.long
        marks = [late] if index >= quick else []
        cases.append(pytest.param(*([value] if isinstance(names, str) else value), marks=marks))
    return pytest.mark.parametrize(names, cases, **options)
