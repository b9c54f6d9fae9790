"""PPO on what `sft.py` made, against a reward model: Llama 2's "RLHF" (§3.2.3) at the size of the shipped teacher.

`--config.prompts=FILE.jsonl` are prompts, conversations or preferences; some of them, chosen by a hash, are held out.
An iteration draws responses from the policy, scores them, and takes a few epochs of clipped steps on them. Rewards are
in standard deviations of the initial policy's, so `heldout_reward` 1.0 is one of them gained. Llama 2 at 7B: learning
rate 1e-6, 512 rollouts, mini-batches of 64, one epoch, beta 0.01, 200 to 400 iterations, all with
`--config.ppo.…` and `--config.optimizer.…`; here rates and epochs are those of a model of 4 million parameters.
`--config.ppo.method=grpo --config.ppo.samples_per_prompt=8` is GRPO: a prompt's samples are each other's baseline.

    python -m gqa.ppo --config=configs/posttraining/ppo.py --workdir=runs/ppo --config.prompts=prompts.jsonl
"""

from ml_collections import ConfigDict, config_dict


def _adam(learning_rate: float) -> dict:
    return dict(
        name="adamw",
        schedule="constant",
        learning_rate=learning_rate,
        clip_norm=1.0,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-5,
        weight_decay=config_dict.placeholder(float),
    )


def get_config() -> ConfigDict:
    """The run."""
    return ConfigDict(
        dict(
            policy="runs/sft/model",
            reward="runs/reward/model",
            safety=config_dict.placeholder(str),
            safety_gate=0.15,
            reference=config_dict.placeholder(str),
            prompts=config_dict.required_placeholder(str),
            template="openbezoar",
            vocabulary="assets/vocabulary/python_4096.model",
            inputs_length=192,
            new_tokens=32,
            temperature=1.0,
            dtype="float32",
            ppo=dict(
                method="ppo",
                rollouts=64,
                samples_per_prompt=1,
                minibatch=16,
                epochs=2,
                clip=0.2,
                value_clip=0.2,
                discount=1.0,
                decay=0.95,
                beta=0.01,
                kl_limit=10.0,
            ),
            optimizer=_adam(5e-5),
            value_optimizer=_adam(1e-4),
            train=dict(
                steps=100,
                seed=0,
                heldout=64,
                eval_every=5,
                patience=6,
                save_every=10,
                keep=2,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
        )
    )
