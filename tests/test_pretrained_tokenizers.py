"""Tokenizers of checkpoints: ids, bytes, special tokens and chat templates. Parity needs transformers (`oracles`)."""

import io
import json

import numpy as np
import pytest
import tokenizers

from jaxcost.data.pretrained import BadTokenizer, read_tokenizer, write_tokenizer
from jaxcost.data.tokenizers import SEPARATOR_SYMBOL, BpeTokenizer, ByteTokenizer, load_tokenizer

CORPUS = ["def add(x, y):\n    return x + y\n", "class A:\n    def add(self):\n        return self\n"] * 20
BPE = BpeTokenizer.train(CORPUS, 280)
TEXTS = ["def add(x):\n\treturn x", "naïve café — 東京 🙂", "a <|end|> and <s> b"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}<|end|>\n    {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [{"role": "user", "content": "add x <|end|>"}, {"role": "assistant", "content": "x + y"}]


@pytest.fixture
def byte_level(tmp_path):
    """As Llama 3 and Qwen have it: byte-level BPE with special tokens, a template beside it."""
    library = tokenizers.Tokenizer.from_str(BPE.serialized)
    library.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in ("<|begin|>", "<|end|>")])
    library.add_tokens(["return"])
    library.save(str(tmp_path / "tokenizer.json"))
    named = {
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "special": True},
        "eos_token": "<|end|>",
        "pad_token": None,
    }
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | kind))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.fixture
def sentence_piece(tmp_path):
    """As Llama 2 has it: a SentencePiece model that falls back to bytes, a template in its config."""
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=made,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\t"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(made.getvalue())
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    template = TEMPLATE.replace("<|end|>", "</s>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": template, "legacy": False}))
    return tmp_path


def check_text(tokenizer, exact):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
        assert not set(ids.tolist()) & {tokenizer.separator_id, *tokenizer.stop_ids}
        spelled = tokenizer.symbols(ids).astype(np.uint8).tobytes().decode()
        assert (spelled if exact else spelled.removeprefix(" ")) == text
        assert tokenizer.token_bytes[ids].sum() == len(spelled.encode())
    ends = np.array([tokenizer.separator_id, *tokenizer.stop_ids])
    assert tokenizer.symbols(ends).tolist() == [SEPARATOR_SYMBOL] * 2 and tokenizer.decode(ends) == ""
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)


def check_saved(tokenizer, path):
    tokenizer.save(path)
    again = load_tokenizer(path)
    assert again == tokenizer and again.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_json_is_read(byte_level):
    tokenizer = read_tokenizer(byte_level)
    check_text(tokenizer, exact=True)
    check_saved(tokenizer, byte_level / "saved.json")
    ids = tokenizer.chat(CHAT)
    # The template's tokens are special, and so is what the conversation spells: it went through the template.
    [end] = tokenizer.stop_ids
    assert ids[0] == tokenizer.separator_id and ids.tolist().count(end) == 3
    assert tokenizer.render(CHAT, answer=False).endswith("[assistant] x + y<|end|>\n")
    with pytest.raises(BadTokenizer, match="refuses this conversation: no tools here"):
        tokenizer.chat([{"role": "tool", "content": ""}])


def test_a_sentencepiece_model_is_read(sentence_piece):
    tokenizer = read_tokenizer(sentence_piece)
    assert (tokenizer.separator_id, tokenizer.stop_ids) == (1, (2,))
    check_text(tokenizer, exact=False)
    check_saved(tokenizer, sentence_piece / "saved.json")
    ids = tokenizer.chat(CHAT)
    assert ids[0] == 1 and ids.tolist().count(2) == 2
    # It does not say what stands around a text, but an encoder was trained to see where it ends.
    assert tokenizer.encode_source("x").tolist() == [*tokenizer.encode("x").tolist(), 2]
    ids, types = tokenizer.encode_pair("x", "y")
    assert ids.tolist() == [*tokenizer.encode("x").tolist(), 2, *tokenizer.encode("y").tolist(), 2]
    assert types.tolist() == [0] * (ids.tolist().index(2) + 1) + [1] * (len(tokenizer.encode("y")) + 1)


def test_an_encoder_reads_a_text_with_what_stands_around_it(byte_level):
    def read(tokenizer):
        return tokenizer.encode_source("x"), tokenizer.encode("x")

    np.testing.assert_array_equal(*read(BPE))
    np.testing.assert_array_equal(*read(read_tokenizer(byte_level)))
    library = tokenizers.Tokenizer.from_str(BPE.serialized)
    library.add_special_tokens(["<|begin|>", "<|end|>"])
    names = [(name, library.token_to_id(name)) for name in ("<|begin|>", "<|end|>")]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        "<|begin|> $A <|end|>", pair="<|begin|> $A <|end|> $B:1 <|end|>:1", special_tokens=names
    )
    library.save(str(byte_level / "tokenizer.json"))
    tokenizer = read_tokenizer(byte_level)
    whole, plain = read(tokenizer)
    (_, begin), (_, end) = names
    assert whole.tolist() == [begin, *plain.tolist(), end]
    ids, types = tokenizer.encode_pair("x", "x\ud800")
    second = tokenizer.encode("x?").tolist()
    assert ids.tolist() == [begin, *plain.tolist(), end, *second, end]
    assert types.tolist() == [0] * (2 + len(plain)) + [1] * (1 + len(second))


def test_the_generation_config_says_where_texts_end(byte_level):
    (byte_level / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    (byte_level / "config.json").write_text(json.dumps({"eos_token_id": 9, "bos_token_id": 3}))
    tokenizer = read_tokenizer(byte_level)
    assert tokenizer.stop_ids == (5, 7) and tokenizer.separator_id == 3


def test_templates_cannot_reach_out(byte_level):
    (byte_level / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(BadTokenizer, match="refuses"):
        read_tokenizer(byte_level).chat(CHAT)


def test_folders_without_a_tokenizer_are_refused(byte_level):
    (byte_level / "chat_template.jinja").unlink()
    with pytest.raises(BadTokenizer, match="has no chat template"):
        read_tokenizer(byte_level).chat(CHAT)
    (byte_level / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BadTokenizer, match="names neither a bos_token"):
        read_tokenizer(byte_level)
    (byte_level / "generation_config.json").write_text('{"eos_token_id": "7"}')
    with pytest.raises(BadTokenizer, match='eos_token_id is "7", which is no id'):
        read_tokenizer(byte_level)
    (byte_level / "generation_config.json").write_text('{"cls_token_id": 3, "sep_token_id": 4}')
    encoder = read_tokenizer(byte_level)
    assert (encoder.separator_id, encoder.stop_ids) == (3, (4,))
    (byte_level / "generation_config.json").unlink()
    (byte_level / "tokenizer.json").write_text("{}")
    with pytest.raises(BadTokenizer, match=r"tokenizer.json could not be read as a tokenizer"):
        read_tokenizer(byte_level)
    (byte_level / "tokenizer.json").unlink()
    with pytest.raises(BadTokenizer, match="holds neither a tokenizer.json nor a SentencePiece model"):
        read_tokenizer(byte_level)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_tokenizers_of_ours_are_written_for_others(tokenizer, tmp_path):
    fields = write_tokenizer(tokenizer, tmp_path)
    assert fields == {"bos_token_id": tokenizer.separator_id, "eos_token_id": tokenizer.separator_id}
    again = read_tokenizer(tmp_path)
    assert (again.vocab_size, again.separator_id) == (tokenizer.vocab_size, tokenizer.separator_id)
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
        assert again.decode(tokenizer.encode(text)) == text
    np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)


@pytest.mark.oracles
@pytest.mark.parametrize("folder", ["byte_level", "sentence_piece"])
def test_ids_and_chats_are_those_of_transformers(folder, request):
    transformers = pytest.importorskip("transformers")
    path = request.getfixturevalue(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours = read_tokenizer(path)
    for text in TEXTS[:2]:
        want = theirs(text, add_special_tokens=False)["input_ids"]
        np.testing.assert_array_equal(ours.encode(text), want)
        assert theirs.decode(want, clean_up_tokenization_spaces=False) == ours.decode(np.array(want))
    for answer in (False, True):
        want = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=answer)
        assert ours.render(CHAT, answer) == want
        if folder == "byte_level":
            want = theirs.apply_chat_template(CHAT, add_generation_prompt=answer, return_dict=False)
            np.testing.assert_array_equal(ours.chat(CHAT, answer), want)
