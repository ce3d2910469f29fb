"""What is compared: a config of config/, and options that differ from it and from small.py.

The rows with gated heads (--head_gate=12) went with that option: they are in commit 6165a6f.
"""

SEEDS = (1, 2, 3)
GPT2 = ["--warmup_steps=20", "--min_lr=0"]
RECIPE = ["speedrun_124m", "--head_lr=0.012"]
KEPT = ["--value_embeds=2", "--even_units=True"]
ROWS = {
    "recipe": RECIPE,
    "recipe_ve": [*RECIPE, "--value_embeds=2"],
    "recipe_average": [*RECIPE, "--average=0.05"],
    "gpt2": ["gpt2_124m", *GPT2, "--learning_rate=4e-3"],
    "gpt2_2e-3": ["gpt2_124m", *GPT2, "--learning_rate=2e-3"],
    "modern": ["gpt2_124m_modern", *GPT2, "--learning_rate=2e-3"],
    "adamw": ["speedrun_124m_adamw", "--warmup_steps=10", "--head_lr=0.012"],
    "recipe_half_the_steps": [*RECIPE, "--max_steps=200"],
    "recipe_even": [*RECIPE, "--even_units=True"],
    "recipe_kept": [*RECIPE, *KEPT],
    "recipe_kept_0.85_of_the_steps": [*RECIPE, *KEPT, "--max_steps=340"],
}
