import io
from pathlib import Path

import pytest
import sentencepiece

from gqa.data.prepare import PrepareSpec, prepare
from gqa.data.vocabulary import Vocabulary

VOCABULARY = Path(__file__).parents[2] / "assets" / "vocabulary" / "python_4096.model"


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """120 small Python files of different lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(120):
        lines = [f"def function_{i}_{j}(x):\n    return x * {j} + {i}\n" for j in range(1 + 7 * i % 23)]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def make_spec(corpus_folder):
    def make(task, **changes):
        spec = {
            "source": str(corpus_folder),
            "vocabulary": str(VOCABULARY),
            "inputs_length": 64,
            "targets_length": None,
        }
        return PrepareSpec(task=task, **{**spec, **changes})

    return make


@pytest.fixture(scope="session")
def records(make_spec, tmp_path_factory):
    """task -> a folder of its records, made once."""
    folders = {}

    def get(task):
        if task not in folders:
            folders[task] = tmp_path_factory.mktemp("records") / task
            prepare(make_spec(task), folders[task])
        return folders[task]

    return get


SYMBOLS = "[INST] [/INST] <<SYS>> <</SYS>> ### Instruction: Response: System: Input: <human>: <bot>:"


@pytest.fixture(scope="session")
def chat_vocabulary(tmp_path_factory):
    """Llama's special ids and space before a text; single characters, and the headings of templates whole."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;!?[]<>/#|_0123456789"]),
        model_writer=model,
        model_type="char",
        vocab_size=150,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[*SYMBOLS.split(), "\n"],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("chat") / "chat.model"
    path.write_bytes(model.getvalue())
    return Vocabulary(path, foreign=True)
