"""Documents of running text, such as web pages: MassiveText's filters and limits (Rae et al. 2021, A.1.1, table A1).

    python -m gqa.data.clean --config=configs/cleaning/text.py --source=FOLDER --output=clean.jsonl

The limits are of English; in other languages the stop words are wrong (`--config.text.min_stop_words=0`), and where
blanks do not separate words, so is what counts words. For source code: `--config.text.collapse_spaces=false` and limits
of its own.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The filters."""
    return ConfigDict(
        dict(
            text=dict(
                repair=True,
                collapse_spaces=True,
                min_characters=0,
                max_characters=10_000_000,
                min_words=50,
                max_words=100_000,
                min_mean_word_length=3.0,
                max_mean_word_length=10.0,
                max_symbols_per_word=0.1,
                max_bullet_lines=0.9,
                max_ellipsis_lines=0.3,
                min_alphabetic_words=0.8,
                min_stop_words=2,
                max_duplicate_lines=0.3,
                max_duplicate_line_characters=0.2,
                max_duplicate_paragraphs=0.3,
                max_duplicate_paragraph_characters=0.2,
                max_top_ngrams=(0.2, 0.18, 0.16),
                max_duplicate_ngrams=(0.15, 0.14, 0.13, 0.12, 0.11, 0.1),
                blocked=(),
                blocked_files=(),
                max_blocked=0,
                languages=(),  # ("en",): English alone
                min_language_probability=0.5,
            ),
            # 13-grams and 0.8: of GPT-3 and of MassiveText.
            duplicates=dict(exact=True, near=True, similarity=0.8, ngram=13, permutations=128),
            contamination=dict(ngram=13, max_share=0.0),  # against the files of --evaluation
            order=None,  # "similarity": documents that are alike follow on each other
        )
    )
