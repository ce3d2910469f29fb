"""What is compared: a config of config/, and options that differ from it and from small.py."""

SEEDS = (1, 2, 3)
GPT2 = ["--warmup_steps=20", "--min_lr=0"]
RECIPE = ["speedrun_124m", "--head_lr=0.012"]
ROWS = {
    "recipe": RECIPE,
    "recipe_ve": [*RECIPE, "--value_embeds=2"],
    "recipe_average": [*RECIPE, "--average=0.05"],
    "gpt2": ["gpt2_124m", *GPT2, "--learning_rate=4e-3"],
    "gpt2_2e-3": ["gpt2_124m", *GPT2, "--learning_rate=2e-3"],
    "modern": ["gpt2_124m_modern", *GPT2, "--learning_rate=2e-3"],
    "adamw": ["speedrun_124m_adamw", "--warmup_steps=10", "--head_lr=0.012"],
    "recipe_half_the_steps": [*RECIPE, "--max_steps=200"],
    "recipe_ve_fast_0.85_of_the_steps": [*RECIPE, "--value_embeds=2", "--newton_schulz=fast", "--max_steps=340"],
    "recipe_ve_0.85_of_the_steps": [*RECIPE, "--value_embeds=2", "--max_steps=340"],
}
