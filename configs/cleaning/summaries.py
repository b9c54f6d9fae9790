"""Articles and their summaries: a summary is shorter than what it sums up, and made of it.

    python -m gqa.data.clean --config=configs/cleaning/summaries.py --source=articles.jsonl \
        --fields=inputs=article,targets=highlights --output=clean.jsonl
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The filters."""
    config = load_config(Path(__file__).parent / "instructions.py").to_dict()
    text = load_config(Path(__file__).parent / "text.py").to_dict()["text"]
    config["inputs"] = text
    config["targets"] = config["targets"] | dict(collapse_spaces=True, min_words=5, max_words=512, blocked=())
    config["pair"] = dict(
        min_compression=2.0,  # words of the article for each of the summary
        max_compression=100.0,
        min_similarity=0.01,  # a summary of another article
        max_similarity=0.8,
    )
    config["duplicates"].update(ngram=5)
    config["contamination"].update(ngram=13)
    return ConfigDict(config)
