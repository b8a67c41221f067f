"""Checkpoints of three kinds of model that are damaged: each is refused in a sentence that names file and tensor, and
nothing is left of what would have been made of it."""

import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from checkpoints import FIELDS, tensors_of, write
from test_conversion import run

from jaxcost.conversion import export_run, import_checkpoint
from jaxcost.data.files import atomic_folder
from jaxcost.data.tokenizers import BpeTokenizer
from jaxcost.models import families, huggingface
from jaxcost.models.transformer import Transformer, abstract
from jaxcost.session import load_run
from jaxcost.transforms import lora, rule

BERT = FIELDS | {"model_type": "bert", "architectures": ["BertForMaskedLM"], "max_position_embeddings": 16}
WHISPER = {
    "model_type": "whisper",
    "vocab_size": 288,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "num_mel_bins": 6,
    "max_source_positions": 10,
    "max_target_positions": 12,
    "decoder_start_token_id": 3,
}
MODELS = {
    "llama": FIELDS | {"vocab_size": 288},
    "bert": BERT | {"vocab_size": 288},
    "whisper": WHISPER,
}
MATRIX = {
    "llama": "model.layers.0.mlp.up_proj.weight",
    "bert": "bert.encoder.layer.0.intermediate.dense.weight",
    "whisper": "model.encoder.layers.0.fc1.weight",
}
TENSORS = functools.cache(lambda family: tensors_of(MODELS[family]))
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Unpickled:
    """Makes a file when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return (open, (str(self.proof), "w"))


@pytest.fixture
def library():
    made = tokenizers.Tokenizer.from_str(BpeTokenizer.train(["def add(x, y): return x"] * 20, 281).serialized)
    made.add_special_tokens(["<|begin|>", "<|end|>"])
    return made


@pytest.fixture
def make(tmp_path, library):
    """A function that writes the checkpoint of a family with other fields and tensors (None for none)."""

    def made(family, fields=(), tensors=(), name="in", **options):
        folder = tmp_path / name
        folder.mkdir()
        changed = TENSORS(family) | dict(tensors)
        given = {tensor: value for tensor, value in changed.items() if value is not None}
        write(folder, MODELS[family] | dict(fields), given, **options)
        library.save(str(folder / "tokenizer.json"))
        named = {"bos_token": "<|begin|>", "cls_token": "<|begin|>", "eos_token": "<|end|>", "sep_token": "<|end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
        return folder

    return made


def refused(folder, said, kind=huggingface.BadCheckpoint, **options):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(kind) as raised:
        import_checkpoint(folder, folder.parent / "new" / "out", quiet=True, **options)
    message = str(raised.value)
    assert said in message and "\n" not in message and message.endswith("."), message
    assert sorted(folder.parent.rglob("*")) == before


every_family = pytest.mark.parametrize("family", MODELS)


# ---- Weights ----


@every_family
@pytest.mark.parametrize("what", ["missing", "extra", "shape", "cut off"])
def test_a_tensor_that_is_not_the_config_s_is_named_with_its_file(family, what, make):
    name, file = MATRIX[family], f"in/{SINGLE}"
    if what == "missing":
        refused(make(family, tensors={name: None}), f"{file} lacks {name}, which a model of this config.json has")
    if what == "extra":
        more = {f"{name}2": np.ones(3, np.float32)}
        refused(make(family, tensors=more), f"{file} has {name}2, which a model of this config.json does not have")
    if what == "shape":
        folder = make(family, tensors={name: np.ones((3, 5), np.float32)})
        refused(folder, f"{file}: {name} has the shape (3, 5), but config.json says (")
    if what == "cut off":
        folder = make(family, cut=2)
        *_, last = TENSORS(family)
        refused(folder, f"{file} is cut off: {last} ends at byte")


@every_family
def test_a_config_that_has_more_layers_or_fewer_than_the_weights_is_refused(family, make):
    layers = "decoder_layers" if family == "whisper" else "num_hidden_layers"
    refused(make(family, {layers: 3}, name="in"), f"in/{SINGLE} lacks ")
    refused(make(family, {layers: 1}, name="other"), f"other/{SINGLE} has ")


@pytest.mark.parametrize("entry", [{"shape": [1e400]}, {"dtype": ["F32"]}, {"data_offsets": [0]}])
def test_a_header_s_entry_that_makes_no_sense_is_named(entry, make):
    folder = make("llama")
    header = json.dumps({"strange": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, "strange")


def test_json_that_is_nested_without_end_is_refused(make):
    folder, deep = make("llama"), b"[" * 200_000
    (folder / SINGLE).write_bytes(len(deep).to_bytes(8, "little") + deep)
    refused(folder, f"in/{SINGLE} is no safetensors file: its header is not JSON")
    (folder / "config.json").write_bytes(deep)
    refused(folder, "in/config.json cannot be read as JSON")


# ---- Files ----


@every_family
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", SINGLE])
def test_a_pickle_is_never_opened(family, name, make, tmp_path):
    folder = make(family)
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(pickle.dumps(Unpickled(tmp_path / "proof")))
    said = "its header does not end within it" if name == SINGLE else "; its pickle files are not read, so save it"
    refused(folder, said)
    pickle.loads((folder / name).read_bytes()).close()
    assert (tmp_path / "proof").exists()


def index_of(folder, tensors):
    (folder / INDEX).write_text(json.dumps({"weight_map": tensors}))


@every_family
def test_an_index_that_does_not_fit_its_files_is_refused(family, make):
    folder, name = make(family), MATRIX[family]
    everything = dict.fromkeys(TENSORS(family), SINGLE)
    index_of(folder, everything | {name: "model-2.safetensors"})
    refused(folder, "There is no ")
    index_of(folder, everything | {"strange": SINGLE})
    refused(folder, f"in/{SINGLE} lacks strange, which {INDEX} says that it holds")
    (folder / "pytorch_model.bin").write_bytes(b"")
    for strange in ("../in/model.safetensors", "pytorch_model.bin"):
        index_of(folder, everything | {name: strange})
        refused(folder, f"in/{INDEX} names {strange}, but only safetensors files in its own folder are read")
    index_of(folder, {})
    refused(folder, f"in/{INDEX} has no weight_map")


def test_of_a_tensor_in_two_files_the_index_says_which(make):
    folder, name = make("llama"), MATRIX["llama"]
    other = make("llama", tensors={name: np.ones((6, 4), np.float32)}, name="other")
    (other / SINGLE).rename(folder / "another.safetensors")
    (folder / SINGLE).rename(folder / "one.safetensors")
    files = ("another.safetensors", "one.safetensors")
    for own, rest in (files, files[::-1]):
        index_of(folder, dict.fromkeys(TENSORS("llama"), rest) | {name: own})
        _, params = huggingface.load(folder)
        assert np.all(params["layers"]["mlp"]["up"]["kernel"][0] == 1) == (own == "another.safetensors")


# ---- Configs ----


@every_family
@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"model_type": "mamba"}, families.UnsupportedModel, "in/config.json: The model_type 'mamba' is not one of"),
        ({"architectures": ["Other"]}, families.UnsupportedModel, "in/config.json: The class 'Other' is not one of"),
        ({"vocab_size": "8"}, families.UnsupportedModel, "in/config.json: vocab_size is '8'; it must be a whole"),
        ({"vocab_size": None}, families.UnsupportedModel, "in/config.json: The config lacks vocab_size"),
        ({"tie_word_embeddings": "no"}, huggingface.BadCheckpoint, "in/config.json: model.tie_embeddings is 'no'"),
    ],
)
def test_a_config_that_is_not_read_is_named(family, change, kind, said, make):
    refused(make(family, change), said, kind)


def test_what_is_not_converted_yet_is_no_run_and_what_has_no_config_no_checkpoint(make):
    folder = make("llama")
    with pytest.raises(ValueError, match=r"in is a checkpoint of transformers; convert it first, with scripts/conv"):
        load_run(folder)
    (folder / "config.json").unlink()
    refused(folder, "There is no ")


# ---- Adapters ----


def adapter_of(folder, fields):
    config = families.config_of(fields)
    params = jax.tree.map(lambda a: jnp.zeros(a.shape), abstract(Transformer(config))[0])
    adapted = lora(rules=(rule("^layers/attention/query/kernel", rank=2),))(params)
    huggingface.save_adapter(folder, config, adapted, fields["model_type"])
    return folder


@every_family
def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_read(family, make, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcost.models.huggingface.reading.read", None)
    folder, fields, file = make(family), MODELS[family], "adapter_model.safetensors"
    wider = adapter_of(tmp_path / "wider", fields | {"d_model" if family == "whisper" else "hidden_size": 12})
    refused(folder, f"wider/{file}: base_model.model.", adapter=wider)
    other = adapter_of(tmp_path / "other", MODELS["bert" if family == "llama" else "llama"])
    refused(folder, f"other/{file} has base_model.model.", adapter=other)
    own = adapter_of(tmp_path / "own", fields)
    options = json.loads((own / "adapter_config.json").read_text())
    for rank, said in ((3, f"own/{file}: base_model.model."), ("2", "own/adapter_config.json says that ")):
        (own / "adapter_config.json").write_text(json.dumps(options | {"r": rank}))
        refused(folder, said, adapter=own)
    (own / file).rename(own / "adapter_model.bin")
    refused(folder, "its pickle file is not read", adapter=own)


# ---- What is asked for ----


def test_a_target_that_cannot_be_made_is_said_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("mine")
    for target, said in ((tmp_path / "file", "file exists already"), (tmp_path / "file" / "out", "no folder that can")):
        with pytest.raises(ValueError, match=said):
            import_checkpoint("nowhere", target)
        with pytest.raises(ValueError, match=said):
            export_run(tmp_path / "nowhere", target)
        with pytest.raises(ValueError, match=said), atomic_folder(target):
            pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@every_family
def test_the_script_says_it_in_a_line(family, make, tmp_path):
    folder = make(family, tensors={MATRIX[family]: None})
    done = run("convert.py", folder, tmp_path / "new" / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stdout == "", done.stderr
    assert done.stderr.startswith(f"error: {folder / SINGLE} lacks {MATRIX[family]}, which")
    assert not (tmp_path / "new").exists()
