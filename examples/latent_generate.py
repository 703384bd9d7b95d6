"""Three agents by transformers' generate(): a planner and a critic run latent steps, a judger answers in text.

Each agent extends past_key_values, a LatentCache, of the one before; its input_ids and attention_mask are its own prompt only.
Prints the length of the cache after each agent, then the answer.
"""

from latentmas import load_model

from latentmas_kernels import accelerate

QUESTION = "Anna is taller than Ben, and Ben is taller than Carl. Who is the shortest?"
LATENT_AGENTS = [
    "Question: {}\n\nYou are the planner. Write a short plan.",
    "Question: {}\n\nYou are the critic. Point out what the plan overlooks.",
]
JUDGER = "Answer the question in one sentence. Question: {}"


def read(model, tokenizer, prompt):
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return inputs.to(model.device)


def discuss(model, tokenizer, question, latent_steps=8, max_new_tokens=24):
    """Return the answer, and the cache after each agent."""
    caches = [None]
    for role in LATENT_AGENTS:
        # The last new token is never fed in, so with one of them the cache ends with the latent steps.
        output = model.generate(
            **read(model, tokenizer, role.format(question)), past_key_values=caches[-1],
            latent_steps=latent_steps, max_new_tokens=1, do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
        caches.append(output.past_key_values)
    inputs = read(model, tokenizer, JUDGER.format(question))
    output = model.generate(
        **inputs, past_key_values=caches[-1],
        max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    text = tokenizer.decode(output.sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text, [*caches[1:], output.past_key_values]


if __name__ == "__main__":
    model, tokenizer = load_model()
    answer, caches = discuss(accelerate(model), tokenizer, QUESTION)
    for name, cache in zip(["planner", "critic", "judger"], caches, strict=True):
        print(f"{name}: {cache.get_seq_length()} positions, the last of them {cache.segments[-1].kind}")
    print(answer)
