"""Two LangChain agents on one accelerated model: a writer drafts, a reviewer comments on the draft.

Needs `pip install langchain-huggingface`. Prints a text of the writer's as it is written, then a draft and its review.
"""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from latentmas import load_model
from transformers import pipeline

from latentmas_kernels import accelerate


def chat_model(model, tokenizer, max_new_tokens=24):
    pipe = pipeline(
        "text-generation", model=model, tokenizer=tokenizer, device=model.device,
        max_new_tokens=max_new_tokens, do_sample=False, return_full_text=False,
    )  # fmt: skip
    return ChatHuggingFace(llm=HuggingFacePipeline(pipeline=pipe), tokenizer=tokenizer)


def agents(model, tokenizer, max_new_tokens=24):
    """Return the writer, from a topic to its text; and both agents, from a topic to the draft and the review."""
    chat = chat_model(model, tokenizer, max_new_tokens)
    writer = (
        ChatPromptTemplate.from_messages([("user", "Write one sentence about {topic}.")]) | chat | StrOutputParser()
    )
    reviewer = (
        ChatPromptTemplate.from_messages(
            [("system", "You are a reviewer."), ("user", "Say in one sentence how to improve this: {draft}")]
        )
        | chat
        | StrOutputParser()
    )
    return writer, RunnablePassthrough.assign(draft=writer).assign(review=reviewer)


if __name__ == "__main__":
    model, tokenizer = load_model()
    writer, both = agents(accelerate(model), tokenizer)
    for piece in writer.stream({"topic": "the sea"}):
        print(piece, end="", flush=True)
    print()
    print(both.invoke({"topic": "a small cat"}))
