"""ModelWrapper: the model class of LatentMAS codebases, on this package's calls."""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentmas_kernels.alignment import Aligner, build_aligner
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.generation import check_sampling, generate, latent_generate
from latentmas_kernels.hf.call_inputs import CallInputs
from latentmas_kernels.hf.chat import ids_behind, render, text_ends, without_end
from latentmas_kernels.hf.legacy_cache import CACHES, past_length
from latentmas_kernels.hf.published import Default, is_device, is_name, load
from latentmas_kernels.hf.vllm_texts import check_vllm, start_vllm, write_texts
from latentmas_kernels.inputs import read_prompt
from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.rope import RopeShift
from latentmas_kernels.outputs import LatentOutput

Messages = Sequence[Mapping[str, Any]]
"""One conversation: {"role": ..., "content": ...}, oldest first."""
Past = Any
"""LatentCache, another transformers Cache, a tuple of (keys, values) by layer, or None."""

_past_length = past_length  # the name that old code imports


class ModelWrapper:
    """A model and its tokenizer behind the method names of the LatentMAS code (arXiv 2511.20639) and its forks.

    `ModelWrapper(model, tokenizer)` wraps loaded objects and changes neither. `ModelWrapper(name, device, use_vllm, args)`
    loads them as the published class does, with its settings: latents are rescaled only ("identity", no W_a) unless
    `args.latent_space_realign`, and caches are of the kind "legacy". A subclass with an `__init__` of its own need not call
    this one: it sets `model` and `tokenizer`, and has the published settings too.

    The methods take and return the same as there, and row b of a padded batch has the same result as alone; padding may be
    left or right. Every method that takes `attention_mask` takes it over the new tokens [B, T] or over past and new
    [B, past + T], with 0 for padding; None means no padding. No past is changed (but a LatentCache that was `donate()`d is
    extended in place).

    A vLLM that it starts ends with `close()`, at the end of a `with` block, or when the wrapper is garbage-collected.

    Attributes:
        model, tokenizer: of transformers. HF_model is the model too.
        device: of prepared inputs; the device of the input embeddings, until it is set.
        HF_device, vllm_device: the device of the model's input embeddings; `device`.
        embedding_layer: the model's input embeddings.
        cache: the class of the returned cache: "latent" (LatentCache), "hf" (`PaddedCache`, a DynamicCache of
            transformers) or "legacy" (`LegacyCache`, which can be indexed as well). The last two grow by T + latent_steps
            columns per call in all rows, padding included, so that arithmetic on columns is right.
        latent_space_realign: whether W_a is applied where no aligner was asked for; None leaves it to "auto".
        use_vllm, vllm_engine: whether there is a vLLM, and its backend.
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
        """Wrap a model and its tokenizer, or load both by name.

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
            UnsupportedModelError: a LatentMASError, where the model cannot run here.
            LatentMASError: for arguments that do not go together, and where vLLM was asked for and is not installed.
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
        """Prefill a prompt and run `latent_steps` latent steps.

        Args:
            input_ids: int [B, T].
            attention_mask, past_key_values: see the class.
            latent_steps: 0 or more; 0 only prefills.
            past_attention_mask: [B, past], 0 for padding, in place of an attention_mask over past and new; a cache that a
                method returned needs none.
            latent_only, sequential_info_only: at the end drop all but the latent steps, or all but this prompt and its latent
                steps. A LatentCache records the gap; in the other kinds the keys are rotated to the positions
                0, 1, 2, ...
            return_latent_embeds: also return the latents [B, latent_steps, D].
            return_hidden_states: also return a dictionary: input_hidden [B, D], the embedding of each row's last prompt token;
                latent_vectors, a list of it and the latents [B, D]; final_hidden [B, D], the state behind the last step.
            max_cache_len: slots per row of a returned LatentCache, so that later calls can extend it in place where it
                is `donate()`d; without it they move it to a larger one.

        Returns:
            The cache: past, prompt and latent steps; with one of the return_ options (cache, the returned value).

        Raises:
            LatentMASError: as `latent_generate`, and for arguments that exclude each other.
        """
        if return_latent_embeds and return_hidden_states:
            raise LatentMASError(
                "return_latent_embeds and return_hidden_states each make a pair of what is returned; pass one (the "
                "latents are among latent_vectors)"
            )
        if latent_only and latent_steps == 0:
            raise LatentMASError("latent_only keeps nothing where latent_steps is 0; leave one of them out")
        model, keep = self.model, "latent" if latent_only else "agent" if sequential_info_only else None
        inputs = self._inputs(input_ids, attention_mask, past_key_values, past_attention_mask)
        cache, output = self._run_latent(model, inputs, latent_steps, keep, max_cache_len)
        if return_latent_embeds:
            return cache, output.latents
        if return_hidden_states:
            last = self._embedded(model, inputs)[:, -1]
            vectors = [last, *output.latents.unbind(1)]
            return cache, {"input_hidden": last, "latent_vectors": vectors, "final_hidden": output.last_hidden}
        return cache

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
        """Run `generate_latent_batch`; also return the fed embeddings, for a server that takes embeddings as a prompt.

        Args:
            input_ids, attention_mask, latent_steps, past_key_values, past_attention_mask, max_cache_len: as in
                `generate_latent_batch`.

        Returns:
            The cache, and the embeddings [B, T + latent_steps, D] in the model's dtype and on its device: each row's
            prompt as the model's embedding module gives it, then its latents. Rows are left-padded with zeros, however
            input_ids was padded, so the last latent_steps columns are the latents of every row, and a row with n real
            tokens fills the last n + latent_steps. The past is not among them.

        Raises:
            LatentMASError: as `latent_generate`.
        """
        model, inputs = self.HF_model, self._inputs(input_ids, attention_mask, past_key_values, past_attention_mask)
        cache, output = self._run_latent(model, inputs, latent_steps, None, max_cache_len)
        return cache, torch.cat([self._embedded(model, inputs), output.latents], dim=1)

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
        """Decode text behind a cache, until each row's end: an end-of-sequence token of the model's generation_config, or
        the token with which the tokenizer's chat template ends an assistant's message.

        Args:
            input_ids: int [B, T], the new tokens.
            attention_mask, past_key_values: see the class; past_attention_mask: as in `generate_latent_batch`.
            max_new_tokens: limit per row, 1 or more.
            temperature: 0 is greedy, None is 1. Above 0 tokens are drawn, and `torch.manual_seed` repeats a call.
            top_p: more than 0, at most 1; None is 1 (off). It and temperature alone shape the distribution: there is no top-k,
                and the sampling settings of the model's generation_config are not read.
            do_sample: False is greedy whatever the temperature is; None goes by the temperature.
            skip_special_tokens: leave them out of the texts.

        Returns:
            Per row the text of its new tokens, without the one that ended it and without blanks around it; and the cache:
            past, prompt and all new tokens but each row's last, which was not fed in.

        Raises:
            LatentMASError: for a temperature or top_p outside of these, and as `generate`.
        """
        temperature, top_p = _sampling(temperature, top_p, do_sample)
        inputs = self._inputs(input_ids, attention_mask, past_key_values, past_attention_mask)
        ends = text_ends(self.model, self.tokenizer)
        output = generate(
            self.model, inputs.input_ids, inputs.attention_mask, past_key_values=inputs.past, max_new_tokens=max_new_tokens,
            do_sample=temperature > 0, temperature=temperature or 1.0, top_k=None, top_p=top_p, eos_token_id=ends,
            engine=self._engine,
        )  # fmt: skip
        new = output.sequences[:, -max(output.new_tokens) :].tolist()
        own = [without_end(row[:count], ends) for row, count in zip(new, output.new_tokens, strict=True)]
        texts = [self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens).strip() for row in own]
        return texts, inputs.extended(output.past_key_values, torch.tensor(output.new_tokens) - 1)

    def vllm_generate_text_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = 0.7,
        top_p: float | None = 0.95,
    ) -> list[str]:
        """Return the text that vLLM decodes for each prompt (text, as of `render_chat`); use_vllm=True starts a vLLM.

        Args:
            max_new_tokens, temperature, top_p: as in `generate_text_batch`.

        Raises:
            LatentMASError: where there is no vLLM, and as `generate_text_batch`.
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
        """Return the embeddings [B, D] that states after the final norm [B, D] are fed back as; for loops of your own.

        Raises:
            LatentMASError: where the aligner is "soft", which starts from logits.
        """
        aligner = build_aligner(model or self.model, self.aligner) if isinstance(self.aligner, str) else self.aligner
        if aligner.needs_logits:
            raise LatentMASError(
                "soft feedback is made of logits, not of hidden states; pass aligner='identity' or 'ridge' to ModelWrapper"
            )
        return aligner(hidden)

    @Default
    def aligner(self) -> str | Aligner:
        """The aligner for `latent_generate`: the argument of the constructor, or by latent_space_realign."""
        if self._aligner is not None:
            return self._aligner
        return {None: "auto", True: "ridge", False: "identity"}[self.latent_space_realign]

    def _inputs(self, input_ids: Tensor, mask: Tensor | None, past: Past, past_mask: Tensor | None) -> CallInputs:
        return CallInputs.of(input_ids.to(self.HF_device), mask, past, past_mask, CACHES.get(self.cache))

    def _run_latent(
        self, model: Any, inputs: CallInputs, latent_steps: int, keep: str | None, max_cache_len: int | None
    ) -> tuple[Any, LatentOutput]:
        """Return the cache and the output of latent_generate(). The cache keeps all slots, or the last by `keep`: "latent"
        the latent steps, "agent" the prompt too."""
        if keep is not None and inputs.cache_class is not None:
            RopeShift.probe(model)  # refuses a model whose keys cannot be moved, before any work
        output = latent_generate(
            model, inputs.input_ids, inputs.attention_mask, latent_steps=latent_steps, past_key_values=inputs.past,
            aligner=self.aligner, engine=self._engine, max_cache_len=max_cache_len,
        )  # fmt: skip
        steps = torch.tensor(output.latent_steps)
        if keep is None:
            return inputs.extended(output.past_key_values, steps), output
        kept = steps + (inputs.counts if keep == "agent" else 0)
        return inputs.keep_last(output.past_key_values, kept, model), output

    @torch.no_grad()
    def _embedded(self, model: Any, inputs: CallInputs) -> Tensor:
        """Return the prompt's embeddings by the model's embedding module, [B, T, D], left-padded with zeros."""
        prompt, _ = read_prompt(Architecture.of(model), inputs.input_ids, inputs.new_mask, None, None)
        assert prompt.input_ids is not None
        read = model.get_input_embeddings()(prompt.input_ids)
        padding = torch.arange(prompt.columns)[None, :] < prompt.columns - prompt.counts[:, None]
        read = read.masked_fill(padding[:, :, None].to(read.device), 0)
        return torch.nn.functional.pad(read, (0, 0, inputs.input_ids.shape[1] - prompt.columns, 0))

    # ---- chats and tokens -------------------------------------------------------------------------------------------

    def render_chat(self, messages: Messages, add_generation_prompt: bool = True, **template_options: Any) -> str:
        """Return a conversation as text, by the tokenizer's chat template.

        Without a template, messages are paragraphs "Role: content" with an empty line between them, and the generation
        prompt is "Assistant:".

        Args:
            messages: one conversation, not empty. What roles there may be is up to the template.
            add_generation_prompt: end with what opens the assistant's answer.
            **template_options: go to the template, such as enable_thinking=False (Qwen3 writes its reasoning without it).

        Raises:
            LatentMASError: for no messages, for something else than messages, and for options where there is no template.
            ChatTemplateError: a LatentMASError, where the template refuses the messages (in the template's own words), fails on
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
        """Render and tokenize one conversation.

        Args:
            messages, add_generation_prompt, **template_options: as in `render_chat`.

        Returns:
            The text, input_ids and attention_mask (int64 [1, T] on the model's device), and the tokens as strings.

        Raises:
            As `render_chat`; LatentMASError where there are no tokens.
        """
        prompts, ids, mask, tokens = self.prepare_chat_batch([messages], add_generation_prompt, **template_options)
        return prompts[0], ids, mask, tokens[0]

    def prepare_chat_batch(
        self, batch_messages: Sequence[Messages], add_generation_prompt: bool = True, **template_options: Any
    ) -> tuple[list[str], Tensor, Tensor, list[list[str]]]:
        """Render and tokenize several conversations, left-padded.

        A chat template writes the special tokens, so no others are added; without a template the tokenizer adds its own.

        Args:
            batch_messages: at least one conversation.
            add_generation_prompt, **template_options: as in `render_chat`.

        Returns:
            The text of each row; input_ids and attention_mask, int64 [B, T] on the model's device (padding is the tokenizer's
            padding token, or 0 where it has none); and per row its tokens as strings, without padding.

        Raises:
            As `render_chat`; LatentMASError for an empty batch and where a row has no tokens.
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
        """Return input_ids, int64 [1, T] on the model's device, of a text that continues another: without special tokens, and
        without the space that SentencePiece tokenizers put before a text that stands alone.

        Raises:
            LatentMASError: where the text has no tokens.
        """
        return torch.tensor([_checked_ids(ids_behind(self.tokenizer, text), text)], device=self.device)

    def _prompt_ids(self, text: str) -> list[int]:
        """Return the token ids of a rendered conversation: a chat template writes the special tokens itself."""
        return _checked_ids(
            self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template)["input_ids"], text
        )


def _checked_ids(ids: list[int], text: str) -> list[int]:
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
    """Return the temperature, 0 for greedy, and top_p, checked."""
    temperature, top_p = 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p
    check_sampling(temperature, top_p)
    if do_sample and temperature == 0:
        raise LatentMASError("got do_sample=True with temperature=0, which is greedy; leave one of them out")
    return (0.0 if do_sample is False else temperature), top_p
