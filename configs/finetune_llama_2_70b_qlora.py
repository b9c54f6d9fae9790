"""QLoRA of Llama-2-70B on one device of 80 GB: rank 8 on all linear maps, the base in NF4, doubly quantised.

The schedule of QLoRA for its largest models (Dettmers et al. 2023): a constant 1e-4, gradients clipped at 0.3. As in
`finetune_llama_2_70b.py` all tokens are targets, so the cost is SFT's. What it takes:

    python -m gqa.plan --config=configs/finetune_llama_2_70b_qlora.py --topology=gpu:h100:1

To run it, put text in `text/`, the checkpoint in `llama-2-70b/` and add `--config.model.checkpoint=llama-2-70b`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from gqa.command_line import load_config


def get_config() -> ConfigDict:
    """The run."""
    config = ConfigDict(load_config(Path(__file__).parent / "finetune_llama_2_70b.py").to_dict())
    config.model.update(param_dtype="bfloat16")  # of what is not in NF4: embedding, logits, norms
    config.adapter = ConfigDict(
        dict(kernels=("*",), rank=8, alpha=16.0, dropout_rate=0.05, rank_stabilised=False, base="nf4")
    )
    config.data.inputs_length = 2048
    config.optimizer.update(schedule="constant", learning_rate=1e-4, clip_norm=0.3, weight_decay=None)
    config.optimizer.update(warmup_steps=None, decay_steps=None, final_ratio=None, beta2=0.999, epsilon=1e-8)
    config.train.accumulation = 64
    return config
