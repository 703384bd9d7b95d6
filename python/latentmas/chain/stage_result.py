"""Data that goes from stage to stage, and what a stage returns."""

from dataclasses import dataclass, field

from latentmas.chain.model_context import SlotInput
from latentmas.chain.question_state import Note
from latentmas.chain.results import AgentMetrics, AgentTrace, AgentTurn
from latentmas_kernels import LatentCache


@dataclass
class ContextState:
    """The cache of a context between two stages, with what else the next stage needs of it.

    Attributes:
        cache: a row for each question; None before the first stage, and where the chain's decoder alone holds it.
        carried_token: per question, the last token of a text that was ended by its length, or nothing. It is not in the cache
            yet; the next prompt begins with it.
        slot_inputs: per question, the inputs of the slots of the cache; empty where the setup does not record them.
    """

    cache: LatentCache | None
    carried_token: list[list[int]]
    slot_inputs: list[list[SlotInput]]

    @classmethod
    def empty(cls, questions: int) -> "ContextState":
        return cls(None, [[] for _ in range(questions)], [[] for _ in range(questions)])


@dataclass
class AgentOutput:
    """Output of one agent for one question: its turn, its text as a note, and the inputs of the slots behind its prompt."""

    turn: AgentTurn
    note: Note | None = None
    slot_inputs: list[SlotInput] = field(default_factory=list)


@dataclass(frozen=True)
class StageResult:
    """Result of a stage.

    Attributes:
        state: for the next stage of the context.
        outputs: per question and agent.
        metrics: per agent, all but other_seconds.
        traces: of agents that run latent steps, where the run was asked for them.
    """

    state: ContextState
    outputs: list[list[AgentOutput]]
    metrics: list[AgentMetrics]
    traces: list[AgentTrace]
