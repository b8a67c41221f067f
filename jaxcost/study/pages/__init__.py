"""Pages for browsers, each put together into one file that needs no network."""

from __future__ import annotations

from typing import Any

import jinja2

from jaxcost.study.figures import significant


def render(name: str, **values: Any) -> str:
    """A page of this folder, with its style and scripts in it; values are escaped as HTML or, by `tojson`, as JSON."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxcost.study", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["significant"] = significant
    return environment.get_template(name).render(values)
