"""The float32 reference of a few steps, one decoder layer of transformers at a time, so that large models fit beside it."""

from typing import Any

import torch
from peers import Side, Start
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentmas_kernels.models.architecture import decoder_of
from latentmas_kernels.ops.realign import realign_reference

LATENT_STEPS = 2  # the second attends to what the first wrote
ROWS = 8  # of a batch at a time: keys and values in float32 are twice those of the model


class _Memory:
    """What a layer's attention wants of a cache: keys and values of one layer and some rows, in float32."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.states = [keys.float(), values.float()]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.new = keys, values
        full = [torch.cat([old, new], dim=2) for old, new in zip(self.states, (keys, values), strict=True)]
        return full[0], full[1]


@torch.no_grad()
def reference(start: Start) -> tuple[Tensor, Tensor]:
    """The hidden state behind LATENT_STEPS latent steps and the logits of a token step behind those, in float32."""
    model, memory = start.model, start.memory
    decoder = decoder_of(model)
    # New keys and values [B, heads, 1, head_dim] by layer, one of each per step.
    appended: list[list[list[Tensor]]] = [[[], []] for _ in decoder.layers]

    def run(module: Any, *args: Any, **kwargs: Any) -> Any:
        exact = {name: weight.float() for name, weight in module.named_parameters()}
        return functional_call(module, exact, args, kwargs)

    def step(x: Tensor, position: int) -> Tensor:
        at = torch.full((1, 1), position, device=x.device)
        rope = decoder.rotary_emb(x, at)
        for index, layer in enumerate(decoder.layers):
            outs, new = [], ([], [])
            exact = {name: weight.float() for name, weight in layer.named_parameters()}
            for rows in torch.arange(len(x)).split(ROWS):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                past = [
                    torch.cat([store[index, part, :, : start.kv].float(), *(t[part] for t in more)], dim=2)
                    for store, more in zip((memory.keys, memory.values), appended[index], strict=True)
                ]
                held = _Memory(*past)
                given = {"position_ids": at, "past_key_values": held, "position_embeddings": rope, "use_cache": True}
                out = functional_call(layer, exact, (x[part, None],), {"attention_mask": None, **given})
                outs.append((out[0] if isinstance(out, tuple) else out)[:, 0])
                for states, fresh in zip(new, held.new, strict=True):
                    states.append(fresh)
            for kept, states in zip(appended[index], new, strict=True):
                kept.append(torch.cat(states))
            x = torch.cat(outs)
        return run(decoder.norm, x)

    with sdpa_kernel(SDPBackend.MATH):
        hidden = start.hidden.float()
        for number in range(LATENT_STEPS):
            hidden = step(realign_reference(hidden, start.aligner.weight, start.aligner.target_norm), start.kv + number)
        state = step(model.get_input_embeddings().weight[start.token].float(), start.kv + LATENT_STEPS)
        return hidden, run(model.get_output_embeddings(), state)


@torch.no_grad()
def errors(side: Side, exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative error of a side's hidden state and logits in the worst row; NaN where there is one in any."""
    side.rewind()
    found = {}
    for name, call, steps, want in zip(
        ("latent", "token"), (side.latent, side.token), (LATENT_STEPS, 1), exact, strict=True
    ):
        got = call(steps).double()
        found[name] = ((got - want).norm(dim=-1) / want.double().norm(dim=-1)).max().item()
    side.rewind()
    return found


def refused(error: float, plain: float) -> str | None:
    """Why there is no time for a result of this error; None where it is right."""
    limit = 2 * plain + 8 * torch.finfo(torch.float32).eps  # of numbers that are right to the last bits
    return None if error <= limit else f"wrong result: error {error:.2e}, allowed are {limit:.2e}"
