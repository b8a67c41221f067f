"""A small model in slots, and what tests of serving ask of it."""

import functools

import jax
import numpy as np
from small import QUICK

from jaxcost.data.tokenizers import ByteTokenizer
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, initialize
from jaxcost.serving.engine import Engine
from jaxcost.serving.slots import Slots, SlotsConfig

TOKENIZER = ByteTokenizer()
CONFIG = ModelConfig(
    vocab_size=384, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, max_length=96
)
MODEL = Transformer(CONFIG)
SLOTS = SlotsConfig(slots=4, prefill_tokens=(4, 16), tokens_per_dispatch=4)


@functools.cache
def params(seed=0):
    made = jax.jit(lambda key: initialize(MODEL, key)[0], compiler_options=QUICK)(jax.random.key(seed))
    # Sharper than new weights are, so that no two tokens are as likely as each other but for rounding, and never
    # an id that no text has.
    kernel = 4 * made["unembed"]["kernel"]
    return {**made, "unembed": {"kernel": kernel.at[:, TOKENIZER.vocab_size :].set(0)}}


@functools.cache
def slots():
    """Shared by all tests of a process, one scheduler after the other."""
    return Slots(MODEL, params(), SLOTS)


@functools.cache
def engine():
    return Engine(MODEL)


def alone(prompt, new_tokens, own=None):
    """The greedy tokens of a prompt by itself, int32 (new_tokens,)."""
    [made] = engine().generate(params() if own is None else own, [prompt], max_new_tokens=new_tokens)
    return made


def prompts(count, seed=0, lengths=(1, 3, 16, 17, 50)):
    """Random prompts of mixed lengths, but of few: each is a shape to compile where one stands alone."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.choice(lengths)).astype(np.int32) for _ in range(count)]
