"""New texts for labels, written by a language model behind an address of OpenAI's API."""

from jaxcost.data.synthesis.config import SynthesisConfig

__all__ = ["SynthesisConfig"]
