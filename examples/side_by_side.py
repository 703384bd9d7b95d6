"""Three specialists run latent steps at the same time; then two judgers answer from the same cache, one of them from the
scientist's part alone.

Prints the segments of the cache, the trace of the scientist's latent steps, and both answers.
"""

import torch
from latentmas import Agent, Chain, load_model, trace_table

from latentmas_kernels import generate

QUESTION = "Anna is taller than Ben, and Ben is taller than Carl. Who is the shortest?"
SPECIALISTS = {
    "math": "You are the mathematician. Write down the quantities.",
    "science": "You are the scientist. Write down the facts.",
    "code": "You are the programmer. Write down the steps.",
}


def agents(latent_steps=10, max_new_tokens=24):
    group = [
        Agent(name, f"Question: {{question}}\n\n{role}", latent_steps=latent_steps, settle=0.999)
        for name, role in SPECIALISTS.items()
    ]
    return [group, Agent("judger", "{question}\n\nAnswer in one sentence.", max_new_tokens=max_new_tokens)]


def answer_from(model, tokenizer, cache, names, max_new_tokens=24):
    """Return the model's answer from some segments of a cache, which is not changed."""
    part = cache.branch()  # no copy yet
    part.keep(["math + science + code", *names])  # the prompts' common prefix begins the conversation
    part.rebase(model)
    text = "<|im_end|>\n<|im_start|>user\nAnswer in one sentence.<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], device=model.device)
    output = generate(model, ids, past_key_values=part, max_new_tokens=max_new_tokens)
    return tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    model, tokenizer = load_model()
    chain = Chain(model, tokenizer, agents())
    print(f"keys and values will take up to {chain.kv_bytes([QUESTION]) / 2**20:.1f} MB")
    result = chain.run([QUESTION], trace=3)
    for segment in result.memory.segments:
        print(f"{segment.name}: slots {segment.start[0]} to {segment.stop[0] - 1}")
    trace_table(None, result.traces[1:2], [QUESTION], tokenizer)
    print("all three:", result.answers[0].text)
    print("the scientist alone:", answer_from(model, tokenizer, result.memory, ["science"]))
