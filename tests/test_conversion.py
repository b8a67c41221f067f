"""scripts/convert.py: a checkpoint becomes a training's folder, from which scripts go on, and comes back the same."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from checkpoints import FIELDS, tensors_of, write
from quick import QUICK_TO_COMPILE
from sweep import sweep

from jaxcost import weights
from jaxcost.config import Experiment
from jaxcost.conversion import export_run, import_checkpoint
from jaxcost.data import DataConfig
from jaxcost.data.pretrained import read_tokenizer
from jaxcost.data.tokenizers import BpeTokenizer
from jaxcost.models import huggingface
from jaxcost.models.huggingface.layout import BadCheckpoint
from jaxcost.serving.engine import Engine
from jaxcost.session import Session, load_run
from jaxcost.transforms import lora, rule

ROOT = Path(__file__).parent.parent
SMALL = FIELDS | {"vocab_size": 288, "max_position_embeddings": 64, "eos_token_id": 281, "model_type": "mistral"}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder, SMALL, tensors_of(SMALL))
    library = tokenizers.Tokenizer.from_str(BpeTokenizer.train(["def add(x, y): return x"] * 20, 281).serialized)
    library.add_special_tokens(["<|begin|>", "<|end|>"])
    library.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def run(script, *arguments):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment["XLA_FLAGS"] += f" {QUICK_TO_COMPILE}"
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_checkpoint_goes_in_and_comes_back(checkpoint, tmp_path):
    import_checkpoint(checkpoint, tmp_path / "run", quiet=True)
    config, want = huggingface.load(checkpoint)
    session, got, step = load_run(tmp_path / "run")
    assert (step, session.model.config) == (0, config)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert session.tokenizer == read_tokenizer(checkpoint) and session.tokenizer.stop_ids == (281,)
    on = Session(Experiment(data=DataConfig(sequence_length=32), start=str(tmp_path / "run")), quiet=True)
    assert (on.model.config, on.tokenizer) == (config, session.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, on.fresh_params(), want)
    assert export_run(tmp_path / "run", tmp_path / "out", quiet=True) == "mistral"
    again, same = huggingface.load(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, want)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["eos_token_id"]) == ("mistral", 281)


ENCODER = SMALL | {
    "model_type": "bert",
    "eos_token_id": None,
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1},
}
IMAGES = {name: value for name, value in ENCODER.items() if name != "vocab_size"}
IMAGES |= {"model_type": "vit", "image_size": 8, "patch_size": 4, "architectures": ["ViTForImageClassification"]}

AUDIO = ENCODER | {"model_type": "hubert", "architectures": ["HubertForSequenceClassification"], "conv_dim": [8, 8]}
AUDIO |= {"conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 4}
AUDIO |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 12, "hidden_act": "gelu"}


ANSWERS = {"model_type": "t5", "vocab_size": 288, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
ANSWERS |= {"decoder_start_token_id": 7, "eos_token_id": 281, "pad_token_id": 0}
LABELS = ANSWERS | {"architectures": ["T5ForSequenceClassification"]}
LABELS |= {name: ENCODER[name] for name in ("id2label", "label2id")}


@sweep("name", ["encoder", "encoder-decoder", "images", "audio"], quick=1)
def test_what_is_no_language_model_goes_in_and_comes_back(name, checkpoint, tmp_path):
    fields = {"encoder": ENCODER, "encoder-decoder": LABELS, "images": IMAGES, "audio": AUDIO}[name]
    write(checkpoint, fields, tensors_of(fields))
    if name in ("images", "audio"):
        (checkpoint / "tokenizer.json").unlink()
        (checkpoint / "tokenizer_config.json").unlink()
        (checkpoint / "preprocessor_config.json").write_text('{"size": 8}')
    if name == "encoder":
        (checkpoint / "tokenizer_config.json").write_text('{"cls_token": "<|begin|>", "sep_token": "<|end|>"}')
    import_checkpoint(checkpoint, tmp_path / "run", quiet=True)
    config, want = huggingface.load(checkpoint)
    session, got, _ = load_run(tmp_path / "run")
    assert session.model.config == config
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for ask in (lambda: session.scorer, session.open):
        with pytest.raises(ValueError, match="Training and scoring are on the next token"):
            ask()
    with pytest.raises(ValueError, match="Generation takes a causal model"):
        Engine(session.model)
    assert export_run(tmp_path / "run", tmp_path / "out", quiet=True) == fields["model_type"]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for field in ("architectures", "id2label", "label2id"):
        assert written[field] == fields[field]
    beside = {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == beside


@pytest.mark.slow
def test_an_encoder_decoder_goes_in_answers_and_comes_back(checkpoint, tmp_path):
    write(checkpoint, ANSWERS, tensors_of(ANSWERS))
    import_checkpoint(checkpoint, tmp_path / "run", quiet=True)
    config, want = huggingface.load(checkpoint)
    session, got, _ = load_run(tmp_path / "run")
    assert session.model.config == config and config.encoder.start == 7
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ValueError, match="Training and scoring are on the next token of a text alone"):
        session.open()
    assert export_run(tmp_path / "run", tmp_path / "out", quiet=True) == "t5"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in ANSWERS} == ANSWERS
    _, same = huggingface.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, same, want)


@pytest.mark.slow
def test_the_script_answers_to_a_source(checkpoint, tmp_path):
    write(checkpoint, ANSWERS, tensors_of(ANSWERS))
    import_checkpoint(checkpoint, tmp_path / "run", quiet=True)
    generate = functools.partial(run, "generate.py", tmp_path / "run", "--tokens", 5)
    sampled = generate("--source", "return x", "--json", tmp_path / "sampled.json")
    assert sampled.returncode == 0, sampled.stderr
    best = generate("--source", "return x", "--beams", 3, "--json", tmp_path / "best.json")
    assert best.returncode == 0, best.stderr
    assert json.loads((tmp_path / "best.json").read_text())["score"] < 0
    for arguments, said in (
        ([], "answers to a source"),
        (["--source", "x", "--draft", tmp_path / "run"], "leave out --source and --beams"),
        (["--source", "x", "--beams", 2, "--stop", "y"], "leave out --stop"),
        (["--source", "x", "--beams", 0], "ask for at least 1"),
    ):
        refused = generate(*arguments)
        assert refused.returncode == 1 and said in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_comes_along(merge, checkpoint, tmp_path):
    config, base = huggingface.load(checkpoint)
    rules = (rule("mlp/.*kernel", rank=3, alpha=7.0), rule("query/kernel", rank=1, dora=True))
    adapted = lora(rules=rules[:1])(base)
    trained, rest = weights.partition(adapted)
    adapted = weights.combine(adapted, {path: a + 0.1 for path, a in trained.items()}, rest)
    huggingface.save_adapter(tmp_path / "adapter", config, adapted, "mistral")
    import_checkpoint(checkpoint, tmp_path / "run", adapter=tmp_path / "adapter", merge=merge, quiet=True)
    session, got, _ = load_run(tmp_path / "run")
    assert bool(session.experiment.transforms) == (not merge)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), weights.merge(got), weights.merge(adapted))
    if not merge:
        export_run(tmp_path / "run", tmp_path / "again", adapter_only=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.slow
def test_the_scripts_go_on_from_it(checkpoint, tmp_path):
    done = run("convert.py", checkpoint, tmp_path / "run", "--dtype", "bfloat16", "--json", tmp_path / "in.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "in.json").read_text()) == {
        "schema": "jaxcost-convert-1",
        "source": str(checkpoint),
        "target": str(tmp_path / "run"),
        "dtype": "bfloat16",
        "direction": "in",
        "layers": 2,
        "width": 4,
        "vocab_size": 288,
    }
    done = run("generate.py", tmp_path / "run", "--prompt", "def", "--tokens", 8, "--top-k", 3, "--stop", "zzz")
    assert done.returncode == 0 and done.stdout.startswith("def"), done.stderr
    done = run("convert.py", tmp_path / "run", tmp_path / "out", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["model_type"] == "mistral"
    done = run("convert.py", tmp_path / "run", tmp_path / "out")
    assert done.returncode == 1 and "out exists already" in done.stderr and done.stderr.count("\n") == 1
    done = run("convert.py", tmp_path / "run", tmp_path / "other", "--merge")
    assert done.returncode == 1 and "--adapter and --merge are for checkpoints" in done.stderr


@pytest.mark.slow
def test_a_model_trained_here_goes_out_with_its_tokenizer(tmp_path):
    data = ["--data.data-dir", tmp_path / "data", "--training.steps", 2, "--evaluation.max-tokens", 512]
    done = run("train.py", ROOT / "configs" / "quickstart.py", "--workdir", tmp_path / "run", *data)
    assert done.returncode == 0, done.stderr
    assert export_run(tmp_path / "run", tmp_path / "out", quiet=True) == "llama"
    session, params, _ = load_run(tmp_path / "run")
    config, got = huggingface.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, got, params)
    again = read_tokenizer(tmp_path / "out")
    np.testing.assert_array_equal(again.encode("def f(x): é"), session.tokenizer.encode("def f(x): é"))
    assert again.stop_ids == session.tokenizer.stop_ids


def test_nothing_is_left_of_what_fails(checkpoint, tmp_path, monkeypatch):
    (checkpoint / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(BadCheckpoint, match="is cut off"):
        import_checkpoint(checkpoint, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists() and len(list(tmp_path.iterdir())) == 1


def test_what_is_no_checkpoint_is_said_in_a_sentence(monkeypatch, tmp_path):
    with pytest.raises(BadCheckpoint, match="There is no folder nowhere; give one, or a name on the hub"):
        import_checkpoint("nowhere", tmp_path / "run")

    def offline(*_, **__):
        raise OSError("no route\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(BadCheckpoint, match=r"a/model is no folder here and could not be fetched .*\(no route\)"):
        import_checkpoint("a/model", tmp_path / "run")
