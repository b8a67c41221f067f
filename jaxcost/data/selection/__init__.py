"""Which texts to learn from, and which to have labelled next."""

from jaxcost.data.selection.config import SelectConfig

__all__ = ["SelectConfig"]
