"""Named system prompts. The texts are MM-EUREKA's own, to the letter (its two backslashes and its grammar included):
published scores can only be reproduced with the prompt they were measured with.

Source: ModalMinds/MM-EUREKA, `SYSTEM_PROMPT_7B` and `SYSTEM_PROMPT_32B` of its evaluation script.
"""

from eureka_megatron.errors import ConfigError, nearest

_OPENING = (
    "Solve the question. The user asks a question, and you solves it. You first thinks about the reasoning process in the "
    "mind and then provides the user with the answer. The answer is in latex format and wrapped in $...$. The final answer "
    r"must be wrapped using the \\boxed{} command. "
)

# Name → text; None leaves each row's own system turn (or the chat template's default) in place.
SYSTEM_PROMPTS: dict[str, str | None] = {
    "none": None,
    "mm_eureka_7b": _OPENING
    + "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> Since $1+1=2$, so the answer is $2$. </think><answer> The answer is "
    r"$\\boxed{2}$ </answer>, which means assistant's output should start with <think> and end with </answer>.",
    "mm_eureka_32b": _OPENING
    + "Th answer should be enclosed within <answer> </answer> tags, i.e., Since $1+1=2$, so the answer is $2$. <answer> "
    r"The answer is $\\boxed{2}$ </answer>, which means the final answer assistant's output should start with <answer> "
    "and end with </answer>.",
}


def system_prompt(name: str) -> str | None:
    """The text of a named system prompt, None for "none".

    Raises:
        ConfigError: there is no such name.
    """
    if name not in SYSTEM_PROMPTS:
        raise ConfigError(f"data.system_prompt: there is no prompt {name!r}{nearest(name, SYSTEM_PROMPTS)}")
    return SYSTEM_PROMPTS[name]
