"""Progress: what is reported while a chain runs, and a run that is interrupted from there."""

import pytest
import torch
from example_chains import AGENTS, CHAINS, MIXED, QUESTIONS, assert_same_memory
from latentmas.chain.chain import Chain

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


@pytest.mark.parametrize("chain", CHAINS)
def test_progress_tells_of_every_step_and_of_the_tokens_written(model, tokenizer, calls, chain):
    agents, heard = CHAINS[chain], []
    Chain(model, tokenizer, agents, aligner="ridge").run(QUESTIONS, on_progress=heard.append)
    assert [(p.agent, p.number, p.step) for p in heard] == [
        (agent, number, step) for number, agent in enumerate(agents, 1) for step in range(agent.steps + 1)
    ]
    assert {p.agents for p in heard} == {len(agents)}
    for number, agent in enumerate(agents, 1):
        reported = [p.tokens for p in heard if p.number == number]
        assert reported[0] is None
        if agent.latent_steps is not None:
            assert reported == [None] * (agent.latent_steps + 1)
        else:
            said = calls[number - 1][2].sequences[:, -agent.max_new_tokens :]
            assert torch.equal(torch.stack(reported[1:], dim=1), said)


def test_an_agent_begins_before_its_prompt_is_read(model, tokenizer):
    """Step 0 is reported while there is still nothing to show."""
    events = []
    model.get_decoder().register_forward_pre_hook(lambda *_: events.append("forward"))
    chain = Chain(model, tokenizer, AGENTS[1:], aligner="ridge", engine="eager")
    events.clear()
    chain.run(["Why?"], on_progress=lambda p: events.append((p.number, p.step)))
    thinking = [(1, 0), "forward", (1, 1), "forward", (1, 2), "forward", (1, 3), "forward"]
    assert events[:12] == [*thinking, (2, 0), "forward", (2, 1), "forward"]


@pytest.mark.parametrize("where", [(1, 0), (1, 3), (2, 0), (2, 4), (3, 1), (4, 9)])
def test_interrupted_by_the_one_who_watches_the_chain_can_run_again(model, tokenizer, where):
    chain = Chain(model, tokenizer, MIXED, aligner="ridge")
    want = chain.run(QUESTIONS)

    def interrupt(progress):
        if (progress.number, progress.step) == where:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chain.run(["What else?", "x"], on_progress=interrupt)
    again = chain.run(QUESTIONS)
    assert again.answers == want.answers
    assert_same_memory(again.memory, want.memory)
