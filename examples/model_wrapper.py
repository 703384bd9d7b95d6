"""Planner, critic and judger with the methods of the LatentMAS code (arXiv 2511.20639), two questions as one batch.

Code that has a ModelWrapper of its own runs on this one unchanged. Prints the judger's answers; the default model is so small
that they show the calls, not the quality of latent reasoning.
"""

from latentmas import load_model

from latentmas_kernels.hf import ModelWrapper

QUESTIONS = ["What is the capital of France?", "How many legs have 3 cats and 2 birds?"]
LATENT_AGENTS = [
    "Question: {}\n\nYou are the planner. Write a short plan.",
    "Question: {}\n\nYou are the critic. Point out what the plan overlooks.",
]
JUDGER = "{}\n\nThe notes may not help. Answer in your own words."


def discuss(wrapper, questions, latent_steps=8, max_new_tokens=24, temperature=0):
    """Return the judger's text for each question, and the cache of all agents."""

    def read(role):
        _, ids, mask, _ = wrapper.prepare_chat_batch([[{"role": "user", "content": role.format(q)}] for q in questions])
        return ids, mask

    cache = None
    for role in LATENT_AGENTS:
        cache = wrapper.generate_latent_batch(*read(role), latent_steps=latent_steps, past_key_values=cache)
    return wrapper.generate_text_batch(
        *read(JUDGER), max_new_tokens=max_new_tokens, temperature=temperature, past_key_values=cache
    )


if __name__ == "__main__":
    texts, _ = discuss(ModelWrapper(*load_model()), QUESTIONS)
    for question, text in zip(QUESTIONS, texts, strict=True):
        print(f"{question}\n  {text}")
