"""Installs gqa: `pip install -e .`, with extras `data`, `clean`, `beam`, `eval`, `parity`, `tpu`, `docs`,
`notebooks`, `dev`: `pip install -e '.[eval]'`.
"""

from setuptools import find_packages, setup

# Models, conversion, decoding, timing and training on prepared records; no TensorFlow.
CORE = [
    "jax>=0.10,<0.13",
    "flax>=0.12.4,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "ml-collections>=1.1",
    "numpy>=2.1",
    "sentencepiece>=0.2.3",
    "safetensors>=0.7",
    "grain>=0.2.15",
    "array_record",
    "tensorstore",
    "absl-py",
    "tqdm",
    "matplotlib",
    "tensorboard",
    "jinja2",
]

EXTRAS = {
    # Preparing records from public datasets.
    "data": [
        "seqio==0.0.20",
        "tensorflow>=2.21,<2.22",
        "tensorflow-text",
        "tensorflow-datasets>=4.9.10",
        "importlib-resources",
        "clu",
        "pyarrow",
    ],
    # Scores of generated text, and the LM Evaluation Harness.
    "eval": ["rouge-score", "sacrebleu", "lm_eval>=0.4.13", "tokenizers"],
    # Cleaning text and generated instructions: repair, near-duplicates and near-copies, a guess of the language (its
    # model is in the package).
    "clean": ["ftfy>=6.3", "datasketch>=2.0", "py3langid>=0.4", "rapidfuzz>=3.13"],
    # Preparing and cleaning on many machines; it holds protobuf below 7 and pyarrow below 26.
    "beam": ["apache-beam>=2.77"],
    # The other implementations that the tests compare against.
    "parity": ["torch==2.13.0", "transformers>=5.23,<6", "ctranslate2>=4.8,<5", "peft", "accelerate"],
    # TPUs, and compiling for TPUs that are not there.
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    # The documentation as a site.
    "docs": ["mkdocs>=1.6,<2", "mkdocstrings[python]>=1.0,<2"],
    # Running the notebooks without a browser; to read and change them, jupyterlab or what you like.
    "notebooks": ["nbclient", "nbformat", "ipykernel"],
    "dev": ["pytest", "pytest-xdist", "ruff", "hypothesis"],
}

setup(
    name="gqa",
    version="0.1.0",
    description="Convert multi-head transformers to grouped-query attention and uptrain them, in JAX and Flax.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gqa", "gqa.*", "checkpoints_tools", "experiments"]),
    install_requires=CORE,
    extras_require=EXTRAS,
)
