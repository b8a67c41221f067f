"""The corpus and the door to TFDS: what counts as text, builds that fail or race, errors in one sentence, silence."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxcost
from jaxcost.data import DataConfig, open_source
from jaxcost.data.corpus import PythonText, validation_member

SOURCES = {f"package/module_{i}.py": f'"""Module {i}."""\nvalue = {i}\n' for i in range(60)}
NOT_LIBRARY = (
    "site-packages/six.py",
    "dist-packages/six.py",
    "test/test_os.py",
    "unittest/test/test_case.py",
    "lib2to3/tests/test_all.py",
    "idlelib/idle_test/test_run.py",
    "__pycache__/os.py",
    "ensurepip/_bundled/pip.py",
    "pydoc_data/topics.py",
    "_sysconfigdata__linux.py",
    "config-3.11/python-config.py",
    "sitecustomize.py",
    "package/notes.txt",
)


class SmallPythonText(PythonText):
    """PythonText over a few files."""

    root: Path
    before_documents = staticmethod(lambda: None)

    def library_root(self):
        return self.root

    def reference_topics(self):
        return {f"topic {i}": f"Topic {i} is explained.\n" for i in range(40)}

    def _documents(self):
        self.before_documents()
        return super()._documents()


@pytest.fixture
def config(tmp_path, monkeypatch):
    root = tmp_path / "library"
    for path in (*SOURCES, *NOT_LIBRARY):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(SOURCES.get(path, "not part of it\n"))
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    monkeypatch.setattr(SmallPythonText, "root", root, raising=False)
    return DataConfig(name="small_python_text/library", data_dir=str(tmp_path / "data"))


def _run_python(code: str) -> subprocess.CompletedProcess:
    root = str(Path(jaxcost.__path__[0]).parent)
    env = {**os.environ, "PYTHONPATH": root}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_library_is_every_source_file_once_and_nothing_else(config):
    train, validation = open_source(config, "train"), open_source(config, "validation")
    assert sorted([*train, *validation]) == sorted(SOURCES.values())
    expected = {text for path, text in SOURCES.items() if validation_member(path, 0.05)}
    assert set(validation) == expected
    assert expected
    metadata = Path(config.data_dir, "small_python_text", "library").glob("*/metadata.json")
    assert [json.loads(file.read_text()) for file in metadata] == [{"undecodable_files": 1}]


def test_a_document_is_in_the_same_split_of_every_configuration(config):
    def split(name, split):
        return set(open_source(dataclasses.replace(config, name=f"small_python_text/{name}"), split))

    for name in ("train", "validation"):
        assert split("all", name) == split("library", name) | split("reference", name)
    assert len(split("reference", "train") | split("reference", "validation")) == 40


def test_split_shares_are_as_asked():
    names = [f"name {i}" for i in range(10_000)]
    assert 0.14 < sum(validation_member(name, 0.15) for name in names) / len(names) < 0.16
    assert not any(validation_member(name, 0) for name in names)


def test_the_same_files_give_the_same_records_in_the_same_order(config, tmp_path):
    first = open_source(config, "train")
    second = open_source(dataclasses.replace(config, data_dir=str(tmp_path / "elsewhere")), "train")
    assert list(first) == list(second)
    assert first.identity == second.identity
    assert first[-1] == first[len(first) - 1]
    assert first[1:3] == [first[1], first[2]]
    with pytest.raises(IndexError):
        first[len(first)]


def test_python_text_lies_under_the_running_pythons_version():
    version = ".".join(map(str, sys.version_info[:3]))
    assert str(PythonText.VERSION) == version
    assert version in PythonText.RELEASE_NOTES
    assert [config.name for config in PythonText.BUILDER_CONFIGS] == ["library", "reference", "all"]


def test_slices_and_sums_of_splits_differ_in_identity(config):
    splits = ("train", "train[:50%]", "train[50%:]", "train+validation")
    sources = [open_source(config, split) for split in splits]
    assert len({source.identity for source in sources}) == 4
    assert list(sources[1]) + list(sources[2]) == list(sources[0])
    assert len(sources[3]) == len(SOURCES)


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tmp_path):
    code = f"""
import os
from jaxcost.data import DataConfig, open_source
from jaxcost.data.corpus import PythonText
class KilledPythonText(PythonText):
    def _generate_examples(self, documents):
        for number, document in enumerate(super()._generate_examples(documents)):
            if number == 20 and {{}}:
                os._exit(9)
            yield document
config = DataConfig(name="killed_python_text/reference", data_dir={str(tmp_path)!r})
print(len(open_source(config, "train")))
"""
    killed = _run_python(code.format(True))
    assert (killed.returncode, killed.stdout) == (9, "")
    assert any("incomplete" in path.name for path in tmp_path.rglob("*"))
    whole = _run_python(code.format(False))
    assert whole.returncode == 0, whole.stderr
    assert int(whole.stdout) > 20


def test_of_two_builds_at_once_the_first_stands_and_both_read_it(config, monkeypatch):
    winner = []

    def other_process():
        monkeypatch.setattr(SmallPythonText, "before_documents", staticmethod(lambda: None))
        winner.append(open_source(config, "train"))

    monkeypatch.setattr(SmallPythonText, "before_documents", staticmethod(other_process))
    loser = open_source(config, "train")
    assert list(loser) == list(winner[0])
    assert len(loser) > 0


def test_a_build_that_another_process_finished_just_before_is_read(config, monkeypatch):
    is_prepared = SmallPythonText.is_prepared

    def finished_after_the_question(builder):
        monkeypatch.setattr(SmallPythonText, "is_prepared", is_prepared)
        assert len(open_source(config, "train")) > 0
        return False

    monkeypatch.setattr(SmallPythonText, "is_prepared", finished_after_the_question)
    assert len(open_source(config, "train")) > 0


def test_a_build_that_fails_gives_its_reason_in_a_sentence(config, monkeypatch):
    def fail():
        raise OSError("no space left\nand many more lines")

    monkeypatch.setattr(SmallPythonText, "before_documents", staticmethod(fail))
    with pytest.raises(ValueError, match=r"could not be prepared \(OSError: no space left\); check") as raised:
        open_source(config, "train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({"name": "imdb_review"}, "train", r"knows no dataset 'imdb_review' \(nearest: imdb_reviews\); set data.name"),
        ({"name": "small_python_text/libary"}, "train", r"no configuration 'libary' \(nearest: library\)"),
        ({}, "test", "has no split 'test'; choose data.train_split and data.validation_split from train, validation"),
        ({"text_field": "body"}, "train", "no text feature 'body'; set data.text_field to one of path, text"),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(config, change, split, message):
    with pytest.raises(ValueError, match=message) as raised:
        open_source(dataclasses.replace(config, **change), split)
    assert "\n" not in str(raised.value)


def test_a_format_that_needs_tensorflow_is_refused_clearly(config):
    open_source(config, "train")
    (info,) = Path(config.data_dir).rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="no random access; set data.data_dir to another folder"):
        open_source(config, "train")


def test_where_derived_files_go(config, tmp_path):
    assert open_source(config, "train").cache_dir == Path(config.data_dir) / "jaxcost_cache"
    elsewhere = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    assert open_source(elsewhere, "train").cache_dir == tmp_path / "cache"


def test_preparing_and_reading_print_nothing(config, capfd):
    list(open_source(config, "validation"))
    output = capfd.readouterr()
    assert output.out == ""
    # The one line that says that a dataset other than Python's own is being prepared comes through logging.
    assert "it/s" not in output.err
    assert "%|" not in output.err


def test_importing_the_package_is_light_and_nothing_imports_tensorflow(tmp_path):
    code = f"""
import sys
import jaxcost.data
print([name for name in ("tensorflow_datasets", "grain", "tokenizers", "jax") if name in sys.modules])
jaxcost.data.open_source(jaxcost.data.DataConfig(name="python_text/reference", data_dir={str(tmp_path)!r}), "train")
print([name for name in ("tensorflow", "grain", "jax") if name in sys.modules])
"""
    done = _run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n[]\n", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": " "}, "data.name is empty"),
        ({"validation_split": "train"}, "both 'train'; give two that don't overlap"),
        ({"tokenizer": "words"}, "use 'bytes' or 'bpe'"),
        ({"bpe_vocab_size": 256}, "must be at least 257"),
        ({"sequence_length": 0}, "data.sequence_length is 0"),
        ({"batch_size": -1}, "data.batch_size is -1"),
        ({"shuffle_seed": 2**32}, "between 0 and"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**change)
