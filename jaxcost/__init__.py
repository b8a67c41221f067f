"""jaxcost: what a transformer costs before you pay, transforms that cut it, and the quality each cut cost you."""

__version__ = "0.1.0"
