"""One decode step of the CUDA engine as captured launches, without the engine around it: replays to time and to compare."""

from collections.abc import Callable
from dataclasses import replace

import torch
from peers import Start
from torch import Tensor

from latentmas_kernels.engines import LatentParams
from latentmas_kernels.engines.cuda_graphs import CudaGraphs, EagerReplay, GraphCapture
from latentmas_kernels.engines.cuda_step import DecodeStep
from latentmas_kernels.models.packed_weights import pack_weights
from latentmas_kernels.ops.triton.launch import LaunchTarget, target_of

LOG_STEPS = 128  # room in the step logs


def pdl_target(device: torch.device, *, enable_pdl: bool) -> LaunchTarget:
    """The target of a captured step, programmatic dependent launch on only where that is wanted and there is one."""
    target = target_of(device, captured=True)
    return replace(target, enable_pdl=enable_pdl and target.enable_pdl)


class Replays:
    """Latent and greedy token steps of one batch size; a `Side` of peers.py.

    Attributes:
        latents: [B, LOG_STEPS, D], tokens: int64 [B, LOG_STEPS]; what the steps since `begin` gave.
    """

    def __init__(self, start: Start, target: LaunchTarget, capture: GraphCapture | None = None) -> None:
        """`capture` is CUDA graphs on a GPU and plain calls elsewhere, where nothing is said."""
        self.start, self.weights = start, pack_weights(start.model, start.architecture)
        batch, device = start.hidden.shape[0], start.hidden.device
        self.step = step = DecodeStep(self.weights, start.architecture, batch, target)
        step.allocate(do_sample=False)
        step.settings.set(
            temperature=1.0, top_k=0, top_p=1.0, seed=0, min_new_tokens=0, pad_token_id=0, eos_token_ids=[]
        )
        self.latents = start.hidden.new_zeros(batch, LOG_STEPS, start.hidden.shape[1])
        self.tokens = torch.zeros(batch, LOG_STEPS, dtype=torch.int64, device=device)
        # Kept here: what stands in for graphs on the CPU keeps nothing alive.
        self.bodies: dict[str, tuple[Callable[[], None], Tensor]] = {
            "latent": (lambda: step.latent(self.weights, start.aligner), self.latents),
            "token": (lambda: step.token(self.weights, do_sample=False), self.tokens),
        }
        capture = capture or (CudaGraphs(device) if device.type == "cuda" else EagerReplay())
        self.graphs = {}
        for phase, (body, step_log) in self.bodies.items():
            step.reset(step_log)
            self.graphs[phase] = capture(body)

    def counters(self) -> dict[str, Tensor]:
        """What programs of a launch count in; 0 between launches."""
        parts = {"products": self.step.workspace, "attention": self.step.splits}
        return {
            f"{of}: {name}": tensor
            for of, part in parts.items()
            for name, tensor in vars(part).items()
            if name.endswith("counters")
        }

    def begin(self, phase: str) -> None:
        """Bind the step to the memory as it stands and set what the first step reads. Not timed."""
        step, memory, batch = self.step, self.start.memory, len(self.tokens)
        params = LatentParams(torch.full((batch,), LOG_STEPS)) if phase == "latent" else None
        step_log = self.latents if phase == "latent" else self.tokens
        step.bind(memory, slice(0, batch), torch.ones(batch, dtype=torch.bool), step_log, params)
        step.hidden.copy_(self.start.hidden)
        step.token_ids.copy_(self.start.token)

    def replay(self, phase: str, steps: int) -> None:
        graph = self.graphs[phase]
        for _ in range(steps):
            graph()

    def rewind(self) -> None:
        self.start.rewind()

    def latent(self, steps: int) -> Tensor:
        return self._run("latent", steps, self.step.hidden)

    def token(self, steps: int) -> Tensor:
        return self._run("token", steps, self.step.logits)

    def _run(self, phase: str, steps: int, result: Tensor) -> Tensor:
        self.begin(phase)
        self.replay(phase, steps)
        self.start.memory.advance(torch.full((len(self.tokens),), steps))
        return result.clone()
