"""Three agents by transformers' generate(): a planner and a critic think in latent steps, a judger answers in text.

What is handed on is past_key_values, a LatentCache; each agent's input_ids and attention_mask are its own prompt only.
Prints how much the memory holds behind each agent, then the answer.
"""

from latentmas import load_model

from latentmas_kernels import accelerate

QUESTION = "Anna is taller than Ben, and Ben is taller than Carl. Who is the shortest?"
THINKERS = [
    "Question: {}\n\nYou are the planner. Write a short plan.",
    "Question: {}\n\nYou are the critic. Point out what the plan overlooks.",
]
JUDGER = "Answer the question in one sentence. Question: {}"


def read(model, tokenizer, prompt):
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return inputs.to(model.device)


def discuss(model, tokenizer, question, latent_steps=8, max_new_tokens=24):
    """The answer, and the memory behind each agent."""
    memories = [None]
    for role in THINKERS:
        # The last new token is never fed in, so with one of them the memory ends with the latent steps.
        thought = model.generate(
            **read(model, tokenizer, role.format(question)), past_key_values=memories[-1],
            latent_steps=latent_steps, max_new_tokens=1, do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
        memories.append(thought.past_key_values)
    inputs = read(model, tokenizer, JUDGER.format(question))
    said = model.generate(
        **inputs, past_key_values=memories[-1],
        max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    text = tokenizer.decode(said.sequences[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text, [*memories[1:], said.past_key_values]


if __name__ == "__main__":
    model, tokenizer = load_model()
    answer, memories = discuss(accelerate(model), tokenizer, QUESTION)
    for name, memory in zip(["planner", "critic", "judger"], memories, strict=True):
        print(f"{name}: {memory.get_seq_length()} positions, the last of them {memory.segments[-1].kind}")
    print(answer)
