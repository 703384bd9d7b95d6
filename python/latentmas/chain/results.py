"""The result of a run: answers, what each agent did for each question, and where the time went."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from latentmas_kernels import Aligner, LatentCache
from latentmas_kernels.trace import LatentTrace


@dataclass(frozen=True)
class AgentTrace:
    """The latent steps of one agent.

    Attributes:
        agent: its name.
        trace: the steps, a row per question of the batch.
        tokenizer: of the model that the agent ran on; None is that of the run.
    """

    agent: str
    trace: LatentTrace
    tokenizer: Any = None


@dataclass(frozen=True)
class AgentTurn:
    """What one agent did for one question.

    Attributes:
        agent: its name.
        prompt_tokens: tokens that it read, the end of the turn before it included.
        latent_steps: latent steps that it took.
        new_tokens: tokens that it wrote, the end token included.
        text: what it wrote, a visible chain of thought included; None for an agent that runs latent steps.
        finish_reason: "stop" or "length" of the text.
        truncated_to: tokens of the text that later agents read, where it was truncated; None where they read all of it.
    """

    agent: str
    prompt_tokens: int
    latent_steps: int = 0
    new_tokens: int = 0
    text: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    truncated_to: int | None = None


@dataclass(frozen=True)
class Answer:
    """The last agent's answer to one question.

    Attributes:
        question: as it was asked.
        text: the answer, without a visible chain of thought before it.
        finish_reason: "stop", or "length" where max_new_tokens ended it.
        turns: one per agent.
    """

    question: str
    text: str
    finish_reason: Literal["stop", "length"]
    turns: list[AgentTurn]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as files of results and `json.dumps` take it."""
        answer = asdict(self)
        for turn in answer["turns"]:
            turn["handed_over"] = turn.pop("truncated_to")  # the key that files of results have had from the first
        return answer


@dataclass
class AgentMetrics:
    """What one agent did for a batch, or, added up, for several. Tokens are summed over the questions, without padding.

    Attributes:
        agent: its name.
        prompt_tokens, latent_steps, new_tokens: positions of the prompt that were computed, latent steps, new tokens.
        shared_tokens: tokens of its prompts that were not computed for it, as they were read once for several rows.
        steps: latent or token steps one after the other; one step works on all rows of a batch.
        prefill_seconds, latent_seconds, decode_seconds: the phases, wall clock.
        other_seconds: tokens from and to text, checks, buffers. Agents that one call runs share its seconds evenly.
        kv_bytes: keys and values in the agent's cache as it ends; over several batches the largest.
    """

    agent: str
    prompt_tokens: int = 0
    latent_steps: int = 0
    new_tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    latent_seconds: float = 0.0
    decode_seconds: float = 0.0
    other_seconds: float = 0.0
    kv_bytes: int = 0
    shared_tokens: int = 0

    @property
    def seconds(self) -> float:
        """Wall clock of the agent: the sum of the phases."""
        return self.prefill_seconds + self.latent_seconds + self.decode_seconds + self.other_seconds

    @property
    def ms_per_step(self) -> float | None:
        """Milliseconds per latent or token step; None without steps."""
        return 1000 * (self.latent_seconds + self.decode_seconds) / self.steps if self.steps else None

    def __add__(self, other: "AgentMetrics") -> "AgentMetrics":
        assert self.agent == other.agent, "metrics are added per agent"
        amounts = [field.name for field in fields(self) if field.name not in ("agent", "kv_bytes")]
        return AgentMetrics(
            self.agent,
            kv_bytes=max(self.kv_bytes, other.kv_bytes),
            **{name: getattr(self, name) + getattr(other, name) for name in amounts},
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds, "ms_per_step": self.ms_per_step}


@dataclass(frozen=True)
class ChainResult:
    """Result of Chain.run().

    Attributes:
        answers: in the order of the questions.
        agents: one per agent, in the order of the chain.
        seconds: wall clock of the run, measured by itself; the agents' seconds add up to it but for the loop around them.
        aligner: the feedback that was used; None where no agent runs latent steps.
        memory: the cache that the last agent left, its prompt and text included. Where the chain's decoder wrote the
            text, the cache that the decoder was given; None where it was given none.
        traces: of each agent that runs latent steps, where the run was asked for them.
    """

    answers: list[Answer]
    agents: list[AgentMetrics]
    seconds: float
    aligner: Aligner | None
    memory: LatentCache | None
    traces: list[AgentTrace] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the cache and the traces, for `json.dumps`."""
        return {
            "answers": [answer.to_dict() for answer in self.answers],
            "agents": [agent.to_dict() for agent in self.agents],
            "seconds": self.seconds,
            "aligner": {"kind": self.aligner.kind, "reason": self.aligner.reason} if self.aligner else None,
        }
