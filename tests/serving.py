"""A small model in slots, and what tests of serving ask of it."""

import functools

import jax
import numpy as np

from jaxcost.data.tokenizers import ByteTokenizer
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, initialize, logits
from jaxcost.serving.engine import Engine, rows_for
from jaxcost.serving.sampling import GREEDY
from jaxcost.serving.slots import Slots, SlotsConfig

TOKENIZER = ByteTokenizer()
CONFIG = ModelConfig(
    vocab_size=384, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, max_length=96
)
MODEL = Transformer(CONFIG)
SLOTS = SlotsConfig(slots=4, prefill_tokens=(4, 16), tokens_per_dispatch=4)


@functools.cache
def params(seed=0):
    made = jax.jit(lambda key: initialize(MODEL, key)[0])(jax.random.key(seed))
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
    """The greedy tokens of a prompt by itself, int32 (new_tokens,); of all lengths by the same programs."""
    own, each = params() if own is None else own, 16
    dispatches = -(-new_tokens // each)
    cache = engine().start(own, batch_size=1, slots=CONFIG.max_length + each)
    logits_BV, cache = engine().prefill(own, _padded(prompt), np.array([len(prompt)]), cache)
    made, rows = [], rows_for(GREEDY, [prompt], CONFIG.vocab_size)
    for _ in range(dispatches):
        tokens, logits_BV, cache, rows = engine().decode(own, logits_BV, cache, rows, steps=each)
        made.append(np.asarray(tokens)[0])
    return np.concatenate(made)[:new_tokens]


def log_probabilities(tokens):
    """Of every next token after each of some tokens, float32 (tokens, V), without a cache."""
    return np.asarray(_log_probabilities()(params(), _padded(tokens)))[: len(tokens)]


def check_log_probabilities(prompt, pieces, prompt_scores):
    """What was said of a prompt's tokens and of those that were made is what the model says of the whole."""
    whole = np.concatenate([prompt, *(piece.scores.tokens for piece in pieces)])
    want = log_probabilities(whole)
    want_own = np.take_along_axis(want[:-1], whole[1:, None], axis=-1)[:, 0]
    got = np.concatenate([prompt_scores.logprobs, *(piece.scores.logprobs for piece in pieces)])
    np.testing.assert_allclose(got, want_own, atol=1e-4)
    top = np.concatenate([piece.scores.top_logprobs for piece in pieces])
    np.testing.assert_allclose(top, -np.sort(-want[len(prompt) - 1 : -1])[:, : SLOTS.top_logprobs], atol=1e-4)


@functools.cache
def _log_probabilities():
    def made(own, tokens):
        hidden, _ = MODEL.apply({"params": own}, tokens)
        return jax.nn.log_softmax(logits(CONFIG, own, hidden[0]), axis=-1)

    return jax.jit(made)


def _padded(tokens):
    return np.pad(np.asarray(tokens, np.int32), (0, CONFIG.max_length - len(tokens)))[None]


def prompts(count, seed=0, lengths=(1, 3, 16, 17, 32, 50)):
    """Random prompts of mixed lengths, at and beside the ends of pieces."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.choice(lengths)).astype(np.int32) for _ in range(count)]
