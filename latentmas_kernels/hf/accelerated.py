"""accelerate(model): `model.generate()` runs on our engines, and takes `latent_steps`.

The object stays the same; its class becomes a subclass of its class, of the same name, in which transformers' decoding loop
(`_sample`, greedy search and sampling) is ours. Everything around the loop is transformers' own.
"""

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GENERATION_MODES_MAPPING

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines import check_engine_options
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.hf.coverage import CACHE
from latentmas_kernels.hf.decode import decode, steps_of
from latentmas_kernels.models.packed_weights import unpack_weights
from latentmas_kernels.warn_once import warn_once

_swapping = threading.Lock()


class _Accelerated:
    """The base of accelerated models' classes: it marks them, and has the methods that need none of the options."""

    _original: ClassVar[Any]
    _options: ClassVar[dict[str, Any]]

    def __enter__(self) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the original class, so that loading it does not need this package."""
        plain = self._original.__new__(self._original)
        plain.__dict__ = self.__dict__
        return plain.__reduce_ex__(1)  # from 2 on pickle insists on the object's present class

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy, accelerated too, with weights of its own."""
        twin = memo[id(self)] = self._original.__new__(self._original)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.__class__ = type(self)
        return twin

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        own = {name: value for name, value in model_kwargs.items() if name != "latent_steps"}
        super()._validate_model_kwargs(own)  # type: ignore[misc]


def _class_of(original: Any, options: dict[str, Any], outer: dict[str, Any] | None) -> Any:
    """Return the subclass of `original` that runs with the options. Its functions are closures over them, since another thread
    may change the object's class during a call.

    Args:
        outer: the options that leaving a `with` block restores; None restores the original class. Not the class itself,
            since a program that accelerates before every call would make a chain of them.
    """

    @torch.no_grad()
    def _sample(
        self: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        latent_steps: int | None = None,
        **model_kwargs: Any,
    ) -> Any:
        loop = functools.partial(
            original._sample,
            self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
        )  # fmt: skip
        return decode(
            self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs,
            loop=loop, latent_steps=latent_steps, **options,
        )  # fmt: skip

    def __exit__(self: Any, *exception: object) -> None:
        with _swapping:
            self.__class__ = original if outer is None else _class_of(original, outer, None)
            if outer is None:
                unpack_weights(self)

    body: dict[str, Any] = {
        "_original": original, "_options": options, "_sample": _sample, "__exit__": __exit__,
        "__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__,
    }  # fmt: skip
    for name in {name for name in GENERATION_MODES_MAPPING.values() if "/" not in name} - {"_sample"}:
        body[name] = _fallback(getattr(original, name), name, options["engine"])
    return type(original.__name__, (_Accelerated, original), body)


def _fallback(loop: Callable[..., Any], name: str, engine: str) -> Callable[..., Any]:
    """Return another decoding loop of transformers, which refuses latent steps, LatentCaches and engines of ours."""
    what = name.strip("_").replace("_", " ")

    @functools.wraps(loop)  # transformers looks at its parameters
    def unchanged(self: Any, *args: Any, latent_steps: int | None = None, **kwargs: Any) -> Any:
        if steps_of(latent_steps, kwargs["generation_config"]):
            raise LatentMASError(
                f"latent steps were asked for with options of {what}; they go with greedy decoding and sampling: leave one of "
                "the two out"
            )
        if isinstance(kwargs.get(CACHE), LatentCache):
            raise LatentMASError(
                f"got a LatentCache with options of {what}, which transformers runs; give it to_hf() with attention_mask()"
            )
        if engine not in ("auto", "eager"):
            raise LatentMASError(f"engine={engine!r} does not cover {what}. Use engine='auto'")
        warn_once(f"{type(self).__name__}: {what} runs in transformers' own loop, at its speed")
        return loop(self, *args, **kwargs)

    return unchanged


def accelerate(model: Any, *, engine: str = "auto", weights: str = "model", aligner: str | Aligner = "auto") -> Any:
    """Let `model.generate()` run on our engines; also as `with accelerate(model) as model:`, which undoes it at the end.

    Greedy decoding and sampling run here where an engine covers the model, with all of generate()'s options that belong to
    them; the rest (beams, assisted decoding, other models, adapters, quantised layers, training mode) runs in transformers
    unchanged, with one warning that says why. generate() takes `latent_steps=n` as well: so many latent steps between the
    prompt and the first new token.

    Args:
        model: a transformers model that can generate. It is changed in place: its class becomes a subclass of the same name.
            Calling it again changes the options. Calls may come from several threads; change the class from one, while none
            of them is in generate().
        engine, weights, aligner: as in `latent_generate`.

    Returns:
        The same object.

    Raises:
        LatentMASError: for an object that cannot be accelerated, and unknown options.
    """
    name = type(model).__name__
    if not isinstance(model, GenerationMixin):
        raise LatentMASError(
            f"got a {name}; accelerate takes a transformers model that can generate (a ...ForCausalLM). Of a wrapper, pass the "
            "model inside"
        )
    check_engine_options(engine, weights)
    if "generate" in vars(model):
        warn_once(
            f"this {name} has a generate() of its own on the object (from its repository, or set by hand), which may pass the "
            "engines by; remove it with `del model.generate`"
        )
    options = {"engine": engine, "weights": weights, "aligner": aligner}
    with _swapping:
        present: Any = type(model)
        if isinstance(model, _Accelerated):
            model.__class__ = _class_of(present._original, options, present._options)
        else:
            model.__class__ = _class_of(present, options, None)
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate(model)`, and give every parameter that the engines moved a storage of its own again.

    The storages of a model that was not accelerated are restored as well: `latent_generate`, `generate` and `ModelWrapper` move
    them too. Tools that save by storage (safetensors' `save_model`, huggingface_hub's `save_torch_model`) need that.

    Returns:
        The same object, of its original class.
    """
    with _swapping:
        if isinstance(model, _Accelerated):
            model.__class__ = type(model)._original
        unpack_weights(model)
    return model
