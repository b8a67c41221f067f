"""A text corpus that every machine already has: the source and the reference of the Python that runs.

Importing this module registers the TFDS dataset `python_text`; it imports TFDS, so import it only where needed.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

_PYTHON = "{}.{}.{}".format(*sys.version_info[:3])
_VALIDATION_FRACTION = {"library": 0.05, "reference": 0.15}

# Installed packages, tests, caches, what ensurepip bundles, the reference, which is a configuration of its own, and
# `encodings`, whose files are nearly all tables of numbers.
_SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "_bundled")
    + ("pydoc_data", "encodings")
)
# Written when Python was built or by its distributor: their text differs between machines with the same version.
_MACHINE_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-", "sitecustomize.", "usercustomize.")


def validation_member(name: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split, which depends on its name alone.

    Args:
      name: path relative to the library with forward slashes, or the name of a topic.
      fraction: expected share of the names in the validation split, 0 to 1.

    Returns:
      True where the first 8 bytes of the name's SHA-256, as a fraction of 2**64, are below `fraction`.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64


class PythonText(tfds.core.GeneratorBasedBuilder):
    """The running Python's standard library and language reference as a TFDS dataset.

    Configurations: `library` (one record a source file), `reference` (one record a topic of the language reference,
    English prose: a shifted domain) and `all` (both). A document is in the same split in each of them. The version
    is that of the running Python, so another Python builds a dataset of its own; what a distributor leaves out of
    the library (tests apart, which never count) is left out here too. Records lie in the order of a hash of their
    names, so the first ones of a split are a fair sample of it.
    """

    VERSION = tfds.core.Version(_PYTHON)
    RELEASE_NOTES = {_PYTHON: f"The text of Python {_PYTHON}, taken from the interpreter that built the dataset."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="library", description="Source files of the standard library, without tests."),
        tfds.core.BuilderConfig(name="reference", description="Topics of the language reference, as pydoc shows them."),
        tfds.core.BuilderConfig(name="all", description="The standard library and the language reference."),
    ]
    # TFDS looks for download checksums beside this file; nothing is downloaded.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Text that ships with Python {_PYTHON}: its standard library and its language reference.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
            homepage="https://docs.python.org/3/",
            license="Python Software Foundation License Version 2",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        documents = self._documents()
        return {
            split: self._generate_examples([document for document in documents if document[0] == split])
            for split in ("train", "validation")
        }

    def _generate_examples(self, documents: list[tuple[str, str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
        for _, path, text in documents:
            yield path, {"text": text, "path": path}

    def library_root(self) -> Path:
        """Returns the folder of the standard library."""
        return Path(sysconfig.get_path("stdlib"))

    def library_files(self) -> Iterator[tuple[str, Path]]:
        """Yields (path relative to the library with forward slashes, file) for every source file, sorted."""
        root = self.library_root()
        for file in sorted(root.rglob("*.py")):
            relative = file.relative_to(root)
            skipped = _SKIPPED_FOLDERS.intersection(relative.parts[:-1])
            if not skipped and not relative.parts[0].startswith(_MACHINE_PREFIXES):
                yield relative.as_posix(), file

    def reference_topics(self) -> dict[str, str]:
        """Returns the text of every topic of the language reference by its name."""
        from pydoc_data import topics  # where a distributor leaves it out, only this configuration is lost

        return dict(topics.topics)

    def _documents(self) -> list[tuple[str, str, str]]:
        """Returns (split, path, text) of every document, sorted; records in the metadata how many were unreadable."""
        kinds = ("library", "reference") if self.builder_config.name == "all" else (self.builder_config.name,)
        documents, undecodable = [], 0
        if "library" in kinds:
            for path, file in self.library_files():
                try:
                    documents.append(("library", path, file.read_bytes().decode("utf-8")))
                except UnicodeDecodeError:
                    undecodable += 1
        if "reference" in kinds:
            documents.extend(("reference", topic, text) for topic, text in sorted(self.reference_topics().items()))
        self.info.metadata["undecodable_files"] = undecodable
        return [
            ("validation" if validation_member(path, _VALIDATION_FRACTION[kind]) else "train", path, text)
            for kind, path, text in documents
        ]
