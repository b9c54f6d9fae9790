"""Questions and answers, instructions and responses: the steps of h2oGPT's data and the tips of instruction tuning.

    python -m gqa.data.clean --config=configs/cleaning/instructions.py --source=qa.jsonl \
        --fields=inputs=instruction,targets=output --output=clean.jsonl

Short texts have no stop words to count and repeat themselves with reason, so of MassiveText's filters only those
against broken text are left. Refusals that other models have written are blocked in responses.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config

REFUSALS = (
    "as an ai language model",
    "as a large language model",
    "i'm sorry but i cannot",
    "i am sorry but i cannot",
    "i cannot fulfill",
    "openai",
    "chatgpt",
)


def get_config() -> ConfigDict:
    """The filters."""
    config = load_config(Path(__file__).parent / "text.py").to_dict()
    text = config.pop("text") | dict(
        collapse_spaces=False,  # answers have code in them
        min_words=2,
        max_words=2048,
        min_mean_word_length=2.0,
        max_mean_word_length=15.0,
        max_symbols_per_word=0.5,
        max_bullet_lines=1.0,
        min_alphabetic_words=0.5,
        min_stop_words=0,
        max_top_ngrams=(0.5, 0.5, 0.5),
        max_duplicate_ngrams=(0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
    )
    config["inputs"] = text
    config["targets"] = text | dict(min_words=1, blocked=REFUSALS)
    config["pair"] = dict(
        min_compression=0.0,
        max_compression=1000.0,
        min_similarity=0.0,
        max_similarity=0.8,  # an answer that says the question again
    )
    config["duplicates"].update(ngram=3, similarity=0.8)
    config["contamination"].update(ngram=8)
    return ConfigDict(config)
