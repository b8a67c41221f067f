"""Packaging of jaxcost; the tools' settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="jaxcost",
    version="0.1.0",
    description="What a transformer costs before you pay, transforms that cut it, and the quality each cut cost you.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxcost", "jaxcost.*"]),
    package_data={"jaxcost": ["**/*.json", "**/*.html", "study/pages/*.css", "study/pages/*.js", "CITATION.cff"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "tensorflow-datasets>=4.9.9,<5",
        "grain>=0.2.16,<0.3",
        "aqtp>=0.9,<0.10",  # "aqt-jax", imported as aqt.jax.v2
        "tokenizers>=0.22,<0.24",
        "huggingface-hub>=1,<3",  # fetches checkpoints; tokenizers needs it anyway
        "jinja2>=3.1,<4",  # chat templates of checkpoints; pages of a study
        "pyyaml>=6,<7",  # CITATION.cff; huggingface-hub needs it anyway
        "sentencepiece>=0.2,<0.3",  # tokenizers of checkpoints that have no tokenizer.json
        "importlib-resources>=6",  # tensorflow-datasets imports it for its own datasets and does not ask for it
        "pyarrow>=16",  # tables on disk; tensorflow-datasets needs it anyway
        "pillow>=11",  # changed images; matplotlib needs it anyway
        "datasketch>=2,<3",  # MinHash
        "numpy>=2,<3",
        "scipy>=1.15,<2",
        "tyro>=1,<2",
        "rich>=14,<16",
        "matplotlib>=3.10,<4",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "gpu": ["jax[cuda12]>=0.10,<0.13"],
        "plan": ["libtpu>=0.0.40; sys_platform == 'linux' and platform_machine == 'x86_64'"],
        # The compiler for NVIDIA GPUs without CUDA's own libraries. On loading, it writes of absent drivers to standard
        # error whatever the script, so it is asked for by itself.
        "plan-gpu": ["jax-cuda12-plugin>=0.10,<0.13", "jax-cuda12-pjrt>=0.10,<0.13"],
        "serve": [
            "fastapi>=0.115,<1",
            "uvicorn>=0.34,<1",
            "prometheus-client>=0.21,<1",
            "python-multipart>=0.0.20,<1",  # forms with files, for FastAPI
            "soundfile>=0.13,<1",  # reads recordings
        ],
        "wordnet": ["wn>=1,<2"],  # synonyms; its data are fetched by itself
        "synthesis": ["openai>=3,<4"],  # OpenAI's own client
        "watch": ["tensorboardX>=2.6,<3", "wandb>=0.20,<1"],
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.130,<7",
            "ruff>=0.14,<0.18",
            "jsonschema>=4,<5",
            "nbclient>=0.10,<1",
            "ipykernel>=6,<8",
            "wn>=1,<2",
            "openai>=3,<4",  # OpenAI's own client, and one that makes requests of the API's document, test the API
            "schemathesis>=4.32,<5",
        ],
        "browser": [
            "playwright>=1.50,<2",  # drives the system's Chromium
            "axe-playwright-python>=0.1.8,<0.2",  # axe-core's rules of accessibility, in the package
        ],
        "oracles": [
            "torch==2.13.0",
            "transformers>=5,<6",
            "peft>=0.19,<0.22",
            "compressed-tensors>=0.15,<1",  # with transformers, the reader of what we write quantised
            "qwix>=0.1.8,<0.2",
            "bitsandbytes>=0.50,<0.51",
            "llmcompressor>=0.14,<0.15",
            "litellm>=1.106,<2",  # clients that the server answers unchanged
            "lm-eval[api]>=0.4.13,<0.5",
        ],
    },
)
