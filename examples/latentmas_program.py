"""A program for the published LatentMAS interface: a class ModelWrapper(model_name, device, use_vllm, args) and its caches.

Nothing in it knows of this package but the import at its end, which was `from models import ModelWrapper`. Prints the judger's
answers, the questions one by one and then in one batch; with `--latent-only` an agent sees only the latent steps of the one
before.
"""

import argparse

import torch

QUESTIONS = [
    "What is the capital of France?",
    "How many legs have 3 cats and 2 birds?",
    "Add 17 and 25.",
    "A train leaves at 9 and arrives at 11. For how many hours does it travel?",
]
LATENT_AGENTS = [
    "You are the planner. Write a plan for: {}",
    "You are the critic. What does the plan for this overlook: {}",
]
JUDGER = "{}\nThe notes may not help. Answer in your own words."


def length_of(past):
    return past[0][0].shape[-2] if past else 0


def last_columns(past, count):
    """Return a past with only the last columns."""
    layers = past.to_legacy_cache() if hasattr(past, "to_legacy_cache") else past
    cut = tuple(tuple(states[..., -count:, :].contiguous() for states in layer) for layer in layers)
    return type(past).from_legacy_cache(cut) if hasattr(past, "from_legacy_cache") else cut


def tokens(wrapper, prompt, questions):
    conversations = [[{"role": "user", "content": prompt.format(question)}] for question in questions]
    prompts, *_ = wrapper.prepare_chat_batch(conversations, add_generation_prompt=True)
    encoded = wrapper.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    return encoded["input_ids"].to(wrapper.device), encoded["attention_mask"].to(wrapper.device)


def answers(wrapper, questions, latent_steps=6, max_new_tokens=24, latent_only=False):
    past = None
    for prompt in LATENT_AGENTS:
        ids, mask = tokens(wrapper, prompt, questions)
        past = wrapper.generate_latent_batch(ids, attention_mask=mask, latent_steps=latent_steps, past_key_values=past)
        if latent_only:
            past = last_columns(past, latent_steps)
    ids, mask = tokens(wrapper, JUDGER, questions)
    texts, past = wrapper.generate_text_batch(
        ids, mask, max_new_tokens=max_new_tokens, temperature=0.6, top_p=1e-6, past_key_values=past
    )
    assert length_of(past) >= ids.shape[1]
    return texts


if __name__ == "__main__":
    from latentmas.default_model import default_model_folder

    from latentmas_kernels.hf import ModelWrapper

    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name", default=str(default_model_folder()))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--latent_space_realign", action="store_true")
    parser.add_argument("--latent-only", action="store_true")
    args = parser.parse_args()
    model = ModelWrapper(args.model_name, torch.device(args.device), use_vllm=False, args=args)
    for text in [answers(model, [q], latent_only=args.latent_only)[0] for q in QUESTIONS]:
        print(text)
    for text in answers(model, QUESTIONS, latent_only=args.latent_only):
        print(text)
