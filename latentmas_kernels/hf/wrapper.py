"""ModelWrapper: the interface that LatentMAS codebases carry along, on this package's calls."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.architecture import Architecture
from latentmas_kernels.cache import LatentCache
from latentmas_kernels.generation import generate, latent_generate
from latentmas_kernels.hf.chat import ids_behind, render, text_ends, without_end
from latentmas_kernels.prompt import read_prompt

Messages = Sequence[Mapping[str, Any]]
"""One conversation: {"role": ..., "content": ...}, oldest first."""


class ModelWrapper:
    """A model and its tokenizer behind the method names of the LatentMAS code (arXiv 2511.20639) and its forks.

    The methods take and give what they do there, and row b of a padded batch gets what it gets alone. Neither the
    model nor the tokenizer is changed: the tokenizer needs no padding token, and its padding side does not matter.

    Every method that takes `attention_mask` takes it over the new tokens [B, T] or over past and new [B, past + T], with
    0 for padding, left or right; None means no padding. Every `past_key_values` may be a LatentCache or another
    transformers Cache and is not changed (a LatentCache that was `donate()`d is extended in place, as asked for). What
    comes back goes into the next call, into transformers (`to_hf()`, `attention_mask()`) or to disk (`save()`).

    Attributes:
        model: the causal LM of transformers.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, *, aligner: str | Aligner = "auto", engine: str = "auto") -> None:
        """
        Args:
            model: a decoder-only causal LM of transformers, in eval mode, on the device where it is to run.
            tokenizer: of transformers, with or without a chat template.
            aligner, engine: as in `latent_generate`.

        Raises:
            UnsupportedModelError: a ValueError, where the model cannot run here.
        """
        Architecture.of(model)
        self.model, self.tokenizer = model, tokenizer
        self._aligner, self._engine = aligner, engine

    @property
    def device(self) -> torch.device:
        """Where the inputs go: the device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    # ---- generation -------------------------------------------------------------------------------------------------

    def generate_latent_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        latent_steps: int,
        past_key_values: Cache | None = None,
    ) -> LatentCache:
        """Read a prompt and think `latent_steps` steps in hidden states.

        Args:
            input_ids: int [B, T] on the model's device.
            attention_mask, past_key_values: see the class.
            latent_steps: 0 or more; 0 only reads the prompt.

        Returns:
            The memory: past, prompt and latent steps.

        Raises:
            ValueError: as `latent_generate`.
        """
        return latent_generate(
            self.model, input_ids, attention_mask, latent_steps=latent_steps, past_key_values=past_key_values,
            aligner=self._aligner, engine=self._engine,
        ).past_key_values  # fmt: skip

    @torch.no_grad()
    def generate_latent_batch_hidden_state(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        latent_steps: int,
        past_key_values: Cache | None = None,
    ) -> tuple[LatentCache, Tensor]:
        """As `generate_latent_batch`, and what the model was fed, for a server that takes embeddings as a prompt.

        Args:
            input_ids, attention_mask, latent_steps, past_key_values: as in `generate_latent_batch`.

        Returns:
            The memory, and the embeddings [B, T + latent_steps, D] in the model's dtype and on its device: each row's
            prompt as the model's embedding module gives it, then its latents. Rows are left-padded with zeros, however
            input_ids was padded, so the last latent_steps columns are the latents of every row, and a row with n real
            tokens fills the last n + latent_steps. The past is not among them.

        Raises:
            ValueError: as `latent_generate`.
        """
        thought = latent_generate(
            self.model, input_ids, attention_mask, latent_steps=latent_steps, past_key_values=past_key_values,
            aligner=self._aligner, engine=self._engine,
        )  # fmt: skip
        columns = input_ids.shape[1]
        mask = None if attention_mask is None else attention_mask[:, -columns:]
        prompt, _ = read_prompt(Architecture.of(self.model), input_ids, mask, None, None)
        read = self.model.get_input_embeddings()(prompt.input_ids)
        padding = torch.arange(prompt.columns)[None, :] < prompt.columns - prompt.counts[:, None]
        embeddings = read.new_zeros(len(read), columns + latent_steps, read.shape[2])
        embeddings[:, columns - prompt.columns : columns] = read.masked_fill(padding[:, :, None].to(read.device), 0)
        embeddings[:, columns:] = thought.latents
        return thought.past_key_values, embeddings

    def generate_text_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.95,
        past_key_values: Cache | None = None,
    ) -> tuple[list[str], LatentCache]:
        """Decode text behind a memory, until each row's end: an end-of-sequence token of the model's generation_config, or
        the token with which the tokenizer's chat template ends an assistant's message.

        Args:
            input_ids: int [B, T] on the model's device, the new tokens.
            attention_mask, past_key_values: see the class.
            max_new_tokens: limit per row, 1 or more.
            temperature: 0 is greedy. Above it tokens are drawn, and `torch.manual_seed` repeats a call.
            top_p: more than 0, at most 1. It and temperature alone shape the distribution: there is no top-k, and what
                the model's generation_config says about sampling is not read.

        Returns:
            Per row the text of its new tokens, without the one that ended it, without special tokens and without blanks
            around it; and the memory: past, prompt and all new tokens but each row's last, which was not fed in.

        Raises:
            ValueError: for a temperature or top_p outside of these, and as `generate`.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more; got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be more than 0 and at most 1 (off); got {top_p}")
        ends = text_ends(self.model, self.tokenizer)
        said = generate(
            self.model, input_ids, attention_mask, past_key_values=past_key_values, max_new_tokens=max_new_tokens,
            do_sample=temperature > 0, temperature=temperature or 1.0, top_k=None, top_p=top_p, eos_token_id=ends,
            engine=self._engine,
        )  # fmt: skip
        new = said.sequences[:, -max(said.new_tokens) :].tolist()
        own = [without_end(row[:count], ends) for row, count in zip(new, said.new_tokens, strict=True)]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in own], said.past_key_values

    # ---- chats and tokens -------------------------------------------------------------------------------------------

    def render_chat(self, messages: Messages, add_generation_prompt: bool = True, **template_options: Any) -> str:
        """A conversation as text, by the tokenizer's chat template.

        Without a template, messages are paragraphs "Role: content" with an empty line between them, and the generation
        prompt is "Assistant:".

        Args:
            messages: one conversation, not empty. What roles there may be is up to the template.
            add_generation_prompt: end with what opens the assistant's answer.
            **template_options: go to the template, such as enable_thinking=False (Qwen3 thinks aloud unless told so).

        Raises:
            ValueError: for no messages, for something else than messages, and for options where there is no template.
            ChatTemplateError: a ValueError, where the template refuses the messages (in the template's own words), fails on
                them, or leaves one out, whether their contents are given to it as text or as lists of parts.
        """
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError(
                "messages must be one conversation, a list of at least one dictionary with a role and a content; "
                f"got {messages!r}"
            )
        if self.tokenizer.chat_template:
            return render(self.tokenizer, messages, add_generation_prompt=add_generation_prompt, **template_options)
        if template_options:
            raise ValueError(
                f"got {', '.join(sorted(template_options))}, but the tokenizer has no chat template that would read it; "
                "set tokenizer.chat_template or leave it out"
            )
        return _paragraphs(messages, add_generation_prompt)

    def prepare_chat_input(
        self, messages: Messages, add_generation_prompt: bool = True, **template_options: Any
    ) -> tuple[str, Tensor, Tensor, list[str]]:
        """One conversation as text and tokens.

        Args:
            messages, add_generation_prompt, **template_options: as in `render_chat`.

        Returns:
            The text, input_ids and attention_mask (int64 [1, T] on the model's device), and the tokens as strings.

        Raises:
            As `render_chat`; ValueError where there are no tokens.
        """
        prompts, ids, mask, tokens = self.prepare_chat_batch([messages], add_generation_prompt, **template_options)
        return prompts[0], ids, mask, tokens[0]

    def prepare_chat_batch(
        self, batch_messages: Sequence[Messages], add_generation_prompt: bool = True, **template_options: Any
    ) -> tuple[list[str], Tensor, Tensor, list[list[str]]]:
        """Several conversations as text and left-padded tokens.

        A chat template writes the special tokens, so no others are added; without a template the tokenizer adds its own.

        Args:
            batch_messages: at least one conversation.
            add_generation_prompt, **template_options: as in `render_chat`.

        Returns:
            Per row the text; input_ids and attention_mask, int64 [B, T] on the model's device (padding is the tokenizer's
            padding token, or 0 where it has none); and per row its tokens as strings, without padding.

        Raises:
            As `render_chat`; ValueError for an empty batch and where a row has no tokens.
        """
        if not batch_messages:
            raise ValueError("batch_messages is empty; every batch needs at least one conversation")
        prompts = [self.render_chat(m, add_generation_prompt, **template_options) for m in batch_messages]
        special = not self.tokenizer.chat_template
        rows = [_some(self.tokenizer(text, add_special_tokens=special)["input_ids"], text) for text in prompts]
        # By hand: the tokenizer pads on a side of its own choice, and refuses to where it has no padding token.
        filler = 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        width = max(map(len, rows))
        ids = torch.tensor([[filler] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return prompts, ids, mask, [self.tokenizer.convert_ids_to_tokens(row) for row in rows]

    def tokenize_text(self, text: str) -> Tensor:
        """input_ids, int64 [1, T] on the model's device, of a text to put behind others: without special tokens, and without
        the space that SentencePiece tokenizers put before a text that stands alone.

        Raises:
            ValueError: where the text has no tokens.
        """
        return torch.tensor([_some(ids_behind(self.tokenizer, text), text)], device=self.device)


def _some(ids: list[int], text: str) -> list[int]:
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens; every row needs at least one")
    return ids


def _paragraphs(messages: Messages, add_generation_prompt: bool) -> str:
    for message in messages:
        if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise ValueError(
                f"every message needs a role and a content, both strings, where the tokenizer has no chat template; "
                f"got {dict(message)!r}"
            )
    paragraphs = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*paragraphs, "Assistant:"] if add_generation_prompt else paragraphs)
