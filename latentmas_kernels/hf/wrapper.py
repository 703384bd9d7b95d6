"""ModelWrapper: the interface that LatentMAS codebases carry along, on this package's calls."""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentmas_kernels.alignment import Aligner, build_aligner
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.generation import LatentOutput, check_sampling, generate, latent_generate
from latentmas_kernels.hf.chat import ids_behind, render, text_ends, without_end
from latentmas_kernels.hf.continued import Continued
from latentmas_kernels.hf.legacy_cache import CACHES, past_length
from latentmas_kernels.hf.published import Default, is_device, is_name, load
from latentmas_kernels.hf.vllm_texts import check_vllm, start_vllm, write_texts
from latentmas_kernels.inputs import read_prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.rope import RopeShift

Messages = Sequence[Mapping[str, Any]]
"""One conversation: {"role": ..., "content": ...}, oldest first."""
Past = Any
"""LatentCache, another transformers Cache, a tuple of (keys, values) by layer, or None."""

_past_length = past_length  # the name that old code imports


class ModelWrapper:
    """A model and its tokenizer behind the method names of the LatentMAS code (arXiv 2511.20639) and its forks.

    `ModelWrapper(model, tokenizer)` wraps what is loaded and changes neither. `ModelWrapper(name, device, use_vllm, args)`
    loads it as the published class does, with its settings: latents are rescaled only ("identity", no W_a) unless
    `args.latent_space_realign`, and caches are of the kind "legacy". A subclass with an `__init__` of its own need not call
    this one: it sets `model` and `tokenizer`, and has the published settings too.

    The methods take and give what they do there, and row b of a padded batch gets what it gets alone; padding may be left or
    right. Every method that takes `attention_mask` takes it over the new tokens [B, T] or over past and new [B, past + T],
    with 0 for padding; None means no padding. No past is changed (a LatentCache that was `donate()`d is extended in place, as
    asked for).

    A vLLM that it starts ends with `close()`, at the end of a `with` block, or when the wrapper is no longer used.

    Attributes:
        model, tokenizer: of transformers. HF_model is the model too.
        device: where prepared inputs go; the device of the input embeddings, until it is set.
        HF_device, vllm_device: the device of the model's input embeddings; `device`.
        embedding_layer: the model's input embeddings.
        cache: the kind of the memory that comes back: "latent" (LatentCache), "hf" (`PaddedCache`, a DynamicCache of
            transformers) or "legacy" (`LegacyCache`, which can be indexed as well). The last two grow by T + latent_steps
            columns per call in all rows, padding included, so that arithmetic on columns is right.
        latent_space_realign: whether W_a is applied where no aligner was asked for; None leaves it to "auto".
        use_vllm, vllm_engine: whether there is a vLLM, and our backend of it.
        model_name, args: as given.
    """

    model: Any
    tokenizer: Any
    model_name: str | None = None
    args: Any = None
    cache = "legacy"
    latent_space_realign: bool | None = False
    use_vllm = False
    vllm_engine: Any = None
    _end_vllm: Callable[[], Any] | None = None
    _aligner: str | Aligner | None = None
    _engine = "auto"

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        use_vllm: bool = False,
        args: Any = None,
        *,
        model_name: str | os.PathLike[str] | None = None,
        device: Any = None,
        aligner: str | Aligner | None = None,
        engine: str = "auto",
        cache: str | None = None,
    ) -> None:
        """
        Args:
            model: a decoder-only causal LM of transformers, in eval mode, on the device where it is to run; or the name of one
                (folder or hub), as model_name.
            tokenizer: of transformers, with or without a chat template. Behind a name, the second argument is the device.
            use_vllm: start a vLLM for `vllm_generate_text_batch`; the model itself then goes to args.device2 with
                args.use_second_HF_model, else to the CPU.
            args: a namespace; read are latent_space_realign, and with use_vllm device2, use_second_HF_model,
                tensor_parallel_size, gpu_memory_utilization and enable_prefix_caching.
            aligner, engine: as in `latent_generate`. An aligner of None is "auto" for a model, and behind a name "identity" or,
                with args.latent_space_realign, "ridge".
            cache: see the class. None is "latent" for a model, and "legacy" behind a name.

        Raises:
            UnsupportedModelError: a ValueError, where the model cannot run here.
            ValueError: for arguments that do not go together, and where vLLM was asked for and is not installed.
            OSError: where there is no model of that name.
        """
        if is_device(tokenizer) and (is_name(model) or model_name is not None):
            tokenizer, device = None, tokenizer
        if is_name(model) and model_name is None:
            model, model_name = None, model
        if model is not None and model_name is None and is_device(tokenizer):
            raise LatentMASError(
                f"got {tokenizer!r} where the tokenizer of {type(model).__name__} belongs; a model runs on the device where it "
                f"is: ModelWrapper(model.to({str(tokenizer)!r}), tokenizer), or give the model's name with a device"
            )
        if (model is None) == (model_name is None) or (tokenizer is None) != (model is None):
            raise LatentMASError(
                "ModelWrapper takes a model and its tokenizer, or a model's name and a device; got model="
                f"{type(model).__name__}, tokenizer={type(tokenizer).__name__}, model_name={model_name!r}, device={device!r}"
            )
        if cache not in (None, "latent", *CACHES):
            raise LatentMASError(f"got cache={cache!r}; supported are 'latent', {', '.join(map(repr, CACHES))}")
        if use_vllm:
            check_vllm()
        if model_name is None:
            self.model, self.tokenizer = model, tokenizer
            self.cache, self.latent_space_realign = "latent", getattr(args, "latent_space_realign", None)
            self.model_name = getattr(getattr(model, "config", None), "name_or_path", None)
        else:
            self.model_name = os.fspath(model_name)
            second = getattr(args, "device2", None) if getattr(args, "use_second_HF_model", False) else "cpu"
            self.model, self.tokenizer = load(self.model_name, second if use_vllm else device)
            self.latent_space_realign = bool(getattr(args, "latent_space_realign", False))
        Architecture.of(self.model)
        self.cache = cache or self.cache
        self.args, self._aligner, self._engine = args, aligner, engine
        if device is not None:
            self.device = torch.device(device)
        if use_vllm:
            self.vllm_engine, self.use_vllm = start_vllm(self.model_name, self.model, args), True
            self._end_vllm = weakref.finalize(self, self.vllm_engine.close)

    def __enter__(self) -> "ModelWrapper":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the vLLM that use_vllm=True started; without one, and a second time, nothing happens. The rest still works."""
        if self._end_vllm is not None:
            self.vllm_engine, self.use_vllm = None, False
            self._end_vllm()

    @Default
    def device(self) -> torch.device:
        return self.HF_device

    @Default
    def vllm_device(self) -> torch.device:
        return self.device

    @Default
    def HF_device(self) -> torch.device:
        return self.embedding_layer.weight.device

    @Default
    def HF_model(self) -> Any:
        return self.model

    @Default
    def embedding_layer(self) -> Any:
        return self.HF_model.get_input_embeddings()

    _past_length = staticmethod(past_length)

    # ---- generation -------------------------------------------------------------------------------------------------

    def generate_latent_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        latent_steps: int,
        past_key_values: Past = None,
        past_attention_mask: Tensor | None = None,
        latent_only: bool = False,
        sequential_info_only: bool = False,
        return_latent_embeds: bool = False,
        return_hidden_states: bool = False,
        max_cache_len: int | None = None,
    ) -> Any:
        """Read a prompt and think `latent_steps` steps in hidden states.

        Args:
            input_ids: int [B, T].
            attention_mask, past_key_values: see the class.
            latent_steps: 0 or more; 0 only reads the prompt.
            past_attention_mask: [B, past], 0 for padding, in place of an attention_mask over past and new; a cache that came
                from here needs none.
            latent_only, sequential_info_only: forget all but the latent steps, or all but this prompt and its latent steps,
                once they are taken. A LatentCache records the gap; in the other kinds the keys are rotated to the positions
                0, 1, 2, ...
            return_latent_embeds: also return the latents [B, latent_steps, D].
            return_hidden_states: also return a dictionary: input_hidden [B, D], the embedding of each row's last prompt token;
                latent_vectors, a list of it and the latents [B, D]; final_hidden [B, D], the state behind the last step.
            max_cache_len: slots per row of a LatentCache that comes back, so that later calls can extend it in place where it
                is `donate()`d; without it they move it to a larger one.

        Returns:
            The memory: past, prompt and latent steps; with one of the return_ options (memory, what was asked for).

        Raises:
            ValueError: as `latent_generate`, and where what is asked for does not go together.
        """
        if return_latent_embeds and return_hidden_states:
            raise LatentMASError(
                "return_latent_embeds and return_hidden_states each make a pair of what is returned; pass one (the "
                "latents are among latent_vectors)"
            )
        if latent_only and latent_steps == 0:
            raise LatentMASError("latent_only keeps nothing where latent_steps is 0; leave one of them out")
        model, keep = self.model, "latent" if latent_only else "agent" if sequential_info_only else None
        past = self._past(input_ids, attention_mask, past_key_values, past_attention_mask)
        memory, thought = self._think(model, past, latent_steps, keep, max_cache_len)
        if return_latent_embeds:
            return memory, thought.latents
        if return_hidden_states:
            last = self._embedded(model, past)[:, -1]
            vectors = [last, *thought.latents.unbind(1)]
            return memory, {"input_hidden": last, "latent_vectors": vectors, "final_hidden": thought.last_hidden}
        return memory

    def generate_latent_batch_hidden_state(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        latent_steps: int,
        past_key_values: Past = None,
        past_attention_mask: Tensor | None = None,
        max_cache_len: int | None = None,
    ) -> tuple[Any, Tensor]:
        """As `generate_latent_batch`, and what the model was fed, for a server that takes embeddings as a prompt.

        Args:
            input_ids, attention_mask, latent_steps, past_key_values, past_attention_mask, max_cache_len: as in
                `generate_latent_batch`.

        Returns:
            The memory, and the embeddings [B, T + latent_steps, D] in the model's dtype and on its device: each row's
            prompt as the model's embedding module gives it, then its latents. Rows are left-padded with zeros, however
            input_ids was padded, so the last latent_steps columns are the latents of every row, and a row with n real
            tokens fills the last n + latent_steps. The past is not among them.

        Raises:
            ValueError: as `latent_generate`.
        """
        model, past = self.HF_model, self._past(input_ids, attention_mask, past_key_values, past_attention_mask)
        memory, thought = self._think(model, past, latent_steps, None, max_cache_len)
        return memory, torch.cat([self._embedded(model, past), thought.latents], dim=1)

    def generate_text_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float | None = 0.7,
        top_p: float | None = 0.95,
        do_sample: bool | None = None,
        past_key_values: Past = None,
        past_attention_mask: Tensor | None = None,
        skip_special_tokens: bool = True,
    ) -> tuple[list[str], Any]:
        """Decode text behind a memory, until each row's end: an end-of-sequence token of the model's generation_config, or
        the token with which the tokenizer's chat template ends an assistant's message.

        Args:
            input_ids: int [B, T], the new tokens.
            attention_mask, past_key_values: see the class; past_attention_mask: as in `generate_latent_batch`.
            max_new_tokens: limit per row, 1 or more.
            temperature: 0 is greedy, None is 1. Above 0 tokens are drawn, and `torch.manual_seed` repeats a call.
            top_p: more than 0, at most 1; None is 1 (off). It and temperature alone shape the distribution: there is no top-k,
                and what the model's generation_config says about sampling is not read.
            do_sample: False is greedy whatever the temperature is; None goes by the temperature.
            skip_special_tokens: leave them out of the texts.

        Returns:
            Per row the text of its new tokens, without the one that ended it and without blanks around it; and the memory:
            past, prompt and all new tokens but each row's last, which was not fed in.

        Raises:
            ValueError: for a temperature or top_p outside of these, and as `generate`.
        """
        temperature, top_p = _sampling(temperature, top_p, do_sample)
        past = self._past(input_ids, attention_mask, past_key_values, past_attention_mask)
        ends = text_ends(self.model, self.tokenizer)
        said = generate(
            self.model, past.input_ids, past.attention_mask, past_key_values=past.cache, max_new_tokens=max_new_tokens,
            do_sample=temperature > 0, temperature=temperature or 1.0, top_k=None, top_p=top_p, eos_token_id=ends,
            engine=self._engine,
        )  # fmt: skip
        new = said.sequences[:, -max(said.new_tokens) :].tolist()
        own = [without_end(row[:count], ends) for row, count in zip(new, said.new_tokens, strict=True)]
        texts = [self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens).strip() for row in own]
        return texts, past.grown(said.past_key_values, torch.tensor(said.new_tokens) - 1)

    def vllm_generate_text_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = 0.7,
        top_p: float | None = 0.95,
    ) -> list[str]:
        """Per prompt (text, as `render_chat` gives it) the text that vLLM writes behind it; use_vllm=True starts one.

        Args:
            max_new_tokens, temperature, top_p: as in `generate_text_batch`.

        Raises:
            ValueError: where there is no vLLM, and as `generate_text_batch`.
            latentmas.backends.base.EngineError: where vLLM failed.
        """
        if self.vllm_engine is None:
            raise LatentMASError(
                "this ModelWrapper has no vLLM: pass use_vllm=True (docs/vllm.md says how to install it), or use "
                "generate_text_batch"
            )
        temperature, top_p = _sampling(temperature, top_p, None)
        rows = [self._prompt_ids(text) for text in prompts]
        return write_texts(
            self.vllm_engine, self.model, self.tokenizer, rows, max_new_tokens, temperature=temperature, top_p=top_p
        )

    def _apply_latent_realignment(self, hidden: Tensor, model: Any = None) -> Tensor:
        """The embeddings [B, D] that states after the final norm [B, D] are fed back as; for loops of your own.

        Raises:
            ValueError: where the aligner is "soft", which starts from logits.
        """
        aligner = build_aligner(model or self.model, self.aligner) if isinstance(self.aligner, str) else self.aligner
        if aligner.needs_logits:
            raise LatentMASError(
                "soft feedback is made of logits, not of hidden states; pass aligner='identity' or 'ridge' to ModelWrapper"
            )
        return aligner(hidden)

    @Default
    def aligner(self) -> str | Aligner:
        """As in `latent_generate`: what was asked for, or what latent_space_realign says."""
        if self._aligner is not None:
            return self._aligner
        return {None: "auto", True: "ridge", False: "identity"}[self.latent_space_realign]

    def _past(self, input_ids: Tensor, mask: Tensor | None, past: Past, past_mask: Tensor | None) -> Continued:
        return Continued.of(input_ids.to(self.HF_device), mask, past, past_mask, CACHES.get(self.cache))

    def _think(
        self, model: Any, past: Continued, latent_steps: int, keep: str | None, max_cache_len: int | None
    ) -> tuple[Any, LatentOutput]:
        """The memory to give back, of which only the last part is kept where `keep` says so, and the thought."""
        if keep is not None and past.kind is not None:
            RopeShift.probe(model)  # refuses a model whose keys cannot be moved, before any work
        thought = latent_generate(
            model, past.input_ids, past.attention_mask, latent_steps=latent_steps, past_key_values=past.cache,
            aligner=self.aligner, engine=self._engine, max_cache_len=max_cache_len,
        )  # fmt: skip
        steps = torch.tensor(thought.latent_steps)
        if keep is None:
            return past.grown(thought.past_key_values, steps), thought
        return past.cut(thought.past_key_values, steps + (past.counts if keep == "agent" else 0), model), thought

    @torch.no_grad()
    def _embedded(self, model: Any, past: Continued) -> Tensor:
        """[B, T, D]: the prompt as the model's embedding module gives it, left-padded with zeros."""
        prompt, _ = read_prompt(Architecture.of(model), past.input_ids, past.new_mask, None, None)
        assert prompt.input_ids is not None
        read = model.get_input_embeddings()(prompt.input_ids)
        padding = torch.arange(prompt.columns)[None, :] < prompt.columns - prompt.counts[:, None]
        read = read.masked_fill(padding[:, :, None].to(read.device), 0)
        return torch.nn.functional.pad(read, (0, 0, past.input_ids.shape[1] - prompt.columns, 0))

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
            raise LatentMASError(
                "messages must be one conversation, a list of at least one dictionary with a role and a content; "
                f"got {messages!r}"
            )
        if self.tokenizer.chat_template:
            return render(self.tokenizer, messages, add_generation_prompt=add_generation_prompt, **template_options)
        if template_options:
            raise LatentMASError(
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
            raise LatentMASError("batch_messages is empty; every batch needs at least one conversation")
        prompts = [self.render_chat(m, add_generation_prompt, **template_options) for m in batch_messages]
        rows = [self._prompt_ids(text) for text in prompts]
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

    def _prompt_ids(self, text: str) -> list[int]:
        """Token ids of a rendered conversation: a chat template writes the special tokens itself."""
        return _some(self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template)["input_ids"], text)


def _some(ids: list[int], text: str) -> list[int]:
    if not ids:
        raise LatentMASError(f"the text {text!r} has no tokens; every row needs at least one")
    return ids


def _paragraphs(messages: Messages, add_generation_prompt: bool) -> str:
    for message in messages:
        if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise LatentMASError(
                f"every message needs a role and a content, both strings, where the tokenizer has no chat template; "
                f"got {dict(message)!r}"
            )
    paragraphs = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*paragraphs, "Assistant:"] if add_generation_prompt else paragraphs)


def _sampling(temperature: float | None, top_p: float | None, do_sample: bool | None) -> tuple[float, float]:
    """Temperature, 0 for greedy, and top_p."""
    temperature, top_p = 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p
    check_sampling(temperature, top_p)
    if do_sample and temperature == 0:
        raise LatentMASError("got do_sample=True with temperature=0, which is greedy; leave one of them out")
    return (0.0 if do_sample is False else temperature), top_p
