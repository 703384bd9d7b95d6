"""The three methods: one agent alone, agents that hand on text, agents that hand on latent memory."""

from collections.abc import Callable

from latentmas.agents import Agent

# The question comes first and the role last: a small model follows what it read last. On SmolLM2-135M the other order
# made the judger talk about the plan instead of answering.
PLAN = "You are the planner. Write a short plan for answering this question."
CRITICISE = "You are the critic. Say what is missing in the plan."
REFINE = "You are the refiner. Write a better plan."
ANSWER = "Give the complete answer in your own words."
DOUBT = "The notes so far may not help."

QUESTION = "Question: {question}\n\n"
NOTES = "Notes so far:\n\n{notes}\n\n"


def single_agent(max_new_tokens: int = 256) -> list[Agent]:
    """One agent that answers at once: what the other methods are held against."""
    return [Agent("solver", f"{{question}}\n\n{ANSWER}", max_new_tokens=max_new_tokens)]


def text_agents(max_new_tokens: int = 256) -> list[Agent]:
    """Planner, critic, refiner and judger; each reads the question and what those before it wrote.

    The baseline TextMAS of LatentMAS, section 5.
    """
    return [
        Agent("planner", f"{QUESTION}{PLAN}", max_new_tokens=max_new_tokens),
        Agent("critic", f"{QUESTION}{NOTES}{CRITICISE}", max_new_tokens=max_new_tokens),
        Agent("refiner", f"{QUESTION}{NOTES}{REFINE}", max_new_tokens=max_new_tokens),
        Agent("judger", f"{NOTES}{{question}}\n\n{DOUBT} {ANSWER}", max_new_tokens=max_new_tokens),
    ]


def latent_agents(latent_steps: int = 10, max_new_tokens: int = 256) -> list[Agent]:
    """Planner, critic and refiner think one after the other in one memory, the judger answers from it.

    The sequential chain of LatentMAS, section 4.
    """
    thinkers = [("planner", PLAN), ("critic", CRITICISE), ("refiner", REFINE)]
    return [
        *(Agent(name, f"{QUESTION}{role}", latent_steps=latent_steps) for name, role in thinkers),
        Agent("judger", f"{{question}}\n\n{DOUBT} {ANSWER}", max_new_tokens=max_new_tokens),
    ]


METHODS: dict[str, Callable[[int, int], list[Agent]]] = {
    "single": lambda latent_steps, max_new_tokens: single_agent(max_new_tokens),
    "text": lambda latent_steps, max_new_tokens: text_agents(max_new_tokens),
    "latent": latent_agents,
}
"""By name: a function of (latent_steps, max_new_tokens) that gives the agents."""
