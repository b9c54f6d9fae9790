"""LaMini's instruction data from a checkpoint: new instructions in the manner of a few seeds, and responses to them.

`--config.seeds=FILE.jsonl` are the seeds; with `--config.lamini.topics=FILE.txt`, a topic a line, calls are guided by
topics as well. Five instructions a call inside <example> tags (OpenBezoar; LaMini: 20); near-copies of seeds are
dropped. The judge is a model that is asked, here the parent, or a reward model (judge.kind=reward), whose threshold is
in the units of its scores. OpenBezoar's judge accepted 74.5 %.

    python -m gqa.instructions --config=configs/posttraining/instructions_lamini.py --output=runs/lamini.jsonl \\
        --config.seeds=chats.jsonl
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The run."""
    return ConfigDict(
        dict(
            parent="runs/sft/model",
            template="openbezoar",
            vocabulary="assets/vocabulary/python_4096.model",
            seeds=config_dict.required_placeholder(str),
            inputs_length=512,
            new_tokens=256,
            temperature=0.7,
            batch_size=16,
            seed=0,
            dtype="float32",
            judge=dict(
                kind="model",
                checkpoint="runs/sft/model",
                template="openbezoar",
                vocabulary="assets/vocabulary/python_4096.model",
                threshold=0.0,
            ),
            lamini=dict(
                calls=100,
                shown=3,
                asked=5,
                topics=config_dict.placeholder(str),
                topics_shown=3,
                near_copies=dict(similarity=0.6, distance=9),
            ),
        )
    )
