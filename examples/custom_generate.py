"""Latent steps by transformers' custom_generate: the model is not changed.

Once with the function, once with a folder that might as well be a repository on the hub. Prints the same text twice, the
first as it is written; it goes on where the latent steps ended.
"""

import functools
from pathlib import Path

from latentmas import load_model
from transformers import TextStreamer

from latentmas_kernels.hf import latent_decode

PROMPT = "Explain why the sky is blue."
FOLDER = Path(__file__).with_name("latent_decoding")


def read(model, tokenizer, prompt):
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return inputs.to(model.device)


def by_function(model, inputs, streamer=None, **options):
    # transformers gives the prompt to the streamer, but not the streamer to a function, which gives it the tokens.
    decode = functools.partial(latent_decode, streamer=streamer)
    return model.generate(**inputs, custom_generate=decode, streamer=streamer, **options)


def by_folder(model, inputs, **options):
    return model.generate(**inputs, custom_generate=str(FOLDER), trust_remote_code=True, **options)


if __name__ == "__main__":
    model, tokenizer = load_model()
    inputs = read(model, tokenizer, PROMPT)
    options = {"latent_steps": 8, "max_new_tokens": 24, "do_sample": False}
    by_function(model, inputs, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **options)
    ids = by_folder(model, inputs, **options)
    print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
