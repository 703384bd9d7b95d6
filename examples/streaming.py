"""Text as it is written: generate() runs in a thread of its own, and its pieces are iterated over.

Prints pieces until the third sentence, then stops the model by closing the iterator. An error in the thread ends the
iteration and is raised here: the streamer alone would wait for ever.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from latentmas import load_model
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from latentmas_kernels import accelerate


class Stopped(StoppingCriteria):
    """Ends all rows once an event is set."""

    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream(model, tokenizer, prompt, **options):
    """Yield pieces of the answer; `close()` stops the model."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    streamer, stop = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), threading.Event()

    def write():
        try:
            criteria = StoppingCriteriaList([Stopped(stop)])
            model.generate(**inputs.to(model.device), streamer=streamer, stopping_criteria=criteria, **options)
        finally:
            streamer.end()  # also after an error, or the reader would wait for the next piece

    with ThreadPoolExecutor(1) as pool:  # leaving it waits for the thread
        writing = pool.submit(write)
        try:
            yield from streamer
        finally:
            stop.set()
        writing.result()  # raises what the thread raised


if __name__ == "__main__":
    model, tokenizer = load_model()
    pieces = stream(accelerate(model), tokenizer, "Tell me a story.", max_new_tokens=200, do_sample=False)
    sentences = 0
    for piece in pieces:
        print(piece, end="", flush=True)
        sentences += piece.count(".")
        if sentences == 3:
            break
    pieces.close()
    print()
