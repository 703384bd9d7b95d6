"""Chats through transformers' own text-generation pipeline, on an accelerated model.

accelerate(model) is the only line that plain transformers does not have. Prints one answer per chat; both are decoded as
one batch.
"""

from latentmas import load_model
from transformers import pipeline

from latentmas_kernels import accelerate

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "Anna is taller than Ben, and Ben is taller than Carl. Who is the shortest?"},
    ],
]


def answers(model, tokenizer, chats, batch_size=2):
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer, device=model.device)
    conversations = chat(chats, batch_size=batch_size, max_new_tokens=24, do_sample=False)
    return [conversation["generated_text"][-1]["content"] for (conversation,) in conversations]


if __name__ == "__main__":
    model, tokenizer = load_model()
    for answer in answers(accelerate(model), tokenizer, CHATS):
        print(answer)
