"""The layout of a model's layers, found by a trial: which positions each attends to, and where it keeps keys and values.

A configuration with a sliding window does not mean that a layer has one: Llama's code reads none, Mistral's gives it to all
layers whatever their types say. So the model's own forward runs once, over two tokens, on a twin of its modules that shares the
weights, with a recording attention and a recording mask function registered at transformers (`AttentionInterface`,
`AttentionMaskInterface`): they record the masks that the model's code makes and which layer gets which. A mask carries its
origin, which is kept where the mask is copied, cut or moved to another device, "meta" included. A second run shows that
explicit masks arrive at the layers that they are meant for.
"""

import copy
import functools
import re
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig

from latentmas_kernels.models.module_settings import settings_of

NAME = "latentmas_recorder"
TOKENS = 2
PLACES = (2**20, 2**20 + 777)
"""Positions of queries, far behind any window. Two, since a window moves with the query and a chunk does not."""
FULL, SLIDING = "full_attention", "sliding_attention"
# Functions and methods of tensors whose result is the same mask at another place, of another dtype or cut to a part.
COPYING = frozenset(
    ["__getitem__", "bfloat16", "bool", "clone", "contiguous", "cpu", "cuda", "detach", "expand", "expand_as", "float", "half",
     "narrow", "reshape", "squeeze", "to", "type", "type_as", "unsqueeze", "view"]
)  # fmt: skip

IN_PLACE = re.compile(r"__setitem__|__i[a-z]+__|[a-z]\w*[^_]_")
UNKNOWN = object()


class NoLayoutError(Exception):
    """The model attends in a way that a trial does not show; the message says how, in a clause."""


class _ForwardFailedError(NoLayoutError):
    """The trial could not be run to its end."""


@dataclass(frozen=True)
class Layout:
    """The layers of a decoder in the order in which its forward runs them.

    Attributes:
        windows: per layer, how many positions a query sees, itself included; None is all of them.
        slots: per layer, its place in the KV cache (`layer_idx`); no two are the same.
        shapes: per layer, KV heads and their width.
    """

    windows: tuple[int | None, ...]
    slots: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]


# The key, and the layout or the text of its refusal; an exception would keep the modules of the trial alive.
_known: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Layout | str]]" = weakref.WeakKeyDictionary()


def find_layout(decoder: nn.Module, config: PreTrainedConfig, device: torch.device, cache_argument: str) -> Layout:
    """Return the layout of a decoder, tried once per state of its settings (see module_settings.py); a refusal is kept as well.
    This does not modify the decoder.

    Hooks of single modules are not part of that state, since the twin has none. The refusal of a forward that failed is not
    kept: the cause may have been a lack of memory, a file or a function of other code, and be gone the next time.

    Args:
        cache_argument: the name under which its forward takes a cache.

    Raises:
        NoLayoutError: where its forward attends in another way, or keeps keys and values elsewhere.
    """
    key = settings_of(decoder, leaves=False), device
    known = _known.get(decoder)
    if known is None or known[0] != key:
        try:
            found: Layout | str = _find(decoder, config, device, cache_argument)
        except _ForwardFailedError:
            raise
        except NoLayoutError as refusal:
            found = str(refusal)
        known = _known[decoder] = key, found
    if isinstance(known[1], str):
        raise NoLayoutError(known[1])
    return known[1]


@torch.no_grad()
def _find(decoder: nn.Module, config: PreTrainedConfig, device: torch.device, cache_argument: str) -> Layout:
    own = _try(decoder, config, device, cache_argument, None)
    layout = own.layout()
    widths = sorted({window for window in layout.windows if window is not None})
    if len(widths) > 1:  # engines make one mask per kind of layer, as transformers' masks by the name of a kind
        raise NoLayoutError(
            f"its layers have windows of different widths ({', '.join(map(str, widths))}); one width for all of them is covered"
        )
    names = [FULL if window is None else SLIDING for window in layout.windows]
    given = {name: own.new_mask(name) for name in names}
    arrived = _try(decoder, config, device, cache_argument, given if len(given) > 1 else next(iter(given.values())))
    if not own.made and not own.attended:
        raise NoLayoutError(
            "a forward in the place of its own calls modules by another way than its attributes (a wrapped bound method does), "
            "or neither its masks nor its attention are those of transformers"
        )
    if any(origin != names[layer] for layer, origin in arrived.attended):
        raise NoLayoutError("explicit masks do not arrive at the layers that they are meant for")
    return layout


def _try(
    decoder: nn.Module, config: PreTrainedConfig, device: torch.device, cache_argument: str, mask: Any
) -> "_Trial":
    trial = _Trial(config._attn_implementation or "eager", device)
    token = _trial.set(trial)
    try:
        kinds: set[Any] = set()
        twin = _twin(decoder, {}, kinds)
        if len(kinds) > 1:
            raise NoLayoutError(f"its modules run attention in different ways ({', '.join(sorted(map(str, kinds)))})")
        ids = torch.arange(TOKENS, device=device)[None]
        twin(
            input_ids=torch.zeros_like(ids),
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            position_ids=ids,
            use_cache=True,
            **{cache_argument: trial.cache},
        )
    except NoLayoutError:
        raise
    except Exception as error:  # whatever the code of some model raises; it would raise the same in a call
        first = str(error).partition("\n")[0]
        raise _ForwardFailedError(
            f"its forward does not run over {TOKENS} tokens ({type(error).__name__}: {first})"
        ) from error
    finally:
        _trial.reset(token)
    return trial


class _Mask(Tensor):
    """A mask that carries its origin, as its copies and parts do, and nothing else that is computed from it.

    Attributes:
        origin: the mask function of transformers (None: its default, which is causal), or the name of an explicit mask.
            UNKNOWN where it was changed in place.
    """

    origin: Any

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            name = getattr(function, "__name__", "")
            if args and isinstance(args[0], cls):
                if name in COPYING and type(result) is Tensor:
                    result = result.as_subclass(cls)
                    result.origin = args[0].origin
                elif IN_PLACE.fullmatch(name):
                    args[0].origin = UNKNOWN
        return result


@dataclass
class _Trial:
    """The records of one trial."""

    implementation: str
    device: torch.device
    made: list[Callable[..., Any] | None] = field(default_factory=list)
    stored: list[tuple[int, int, int]] = field(default_factory=list)
    # The number of the stored layer that attends, and the origin of its mask.
    attended: list[tuple[int, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = _RecordingCache(self)

    def new_mask(self, origin: Any) -> _Mask:
        """Return a causal mask [1, 1, T, T], in the form that the model's attention takes."""
        seen = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device=self.device).tril()
        form = seen if self.implementation == "sdpa" else torch.zeros(seen.shape, device=self.device)
        mask = form.as_subclass(_Mask)
        mask.origin = origin
        return mask

    def layout(self) -> Layout:
        slots = tuple(slot for slot, _, _ in self.stored)
        twice = sorted({slot for slot in slots if slots.count(slot) > 1})
        if not slots:
            raise NoLayoutError("its layers keep no keys and values in the cache that they are given")
        if twice:
            raise NoLayoutError(
                f"several of its layers keep their keys and values in the same place, layer_idx {', '.join(map(str, twice))}. "
                "Give each layer of the list an object and a layer_idx of its own: "
                "for i, layer in enumerate(layers): layer.self_attn.layer_idx = i"
            )
        window_of = functools.cache(_window)
        if self.attended:
            found: list[set[int | None]] = [set() for _ in slots]
            for layer, origin in self.attended:
                # Masks that no layer gets do not matter: Qwen2 MoE makes one of a window that is None.
                if origin is UNKNOWN:
                    raise NoLayoutError("its layers attend with other masks than transformers' mask functions make")
                found[layer].add(window_of(origin))
            if any(len(kinds) != 1 for kinds in found):  # DiffLlama's attend twice, with the same mask
                raise NoLayoutError("not each of its layers attends in one way to the keys that it keeps")
            each = [kinds.pop() for kinds in found]
        else:  # attention written out in the layers: all of them take the one mask
            kinds = {window_of(function) for function in self.made} or {None}
            if len(kinds) > 1:
                raise NoLayoutError("its layers attend in different ways, by code of their own")
            each = [kinds.pop()] * len(slots)
        return Layout(tuple(each), slots, tuple((heads, width) for _, heads, width in self.stored))


_trial: ContextVar[_Trial | None] = ContextVar("_trial", default=None)


class _RecordingCache(DynamicCache):
    def __init__(self, trial: _Trial) -> None:
        super().__init__()
        self._trial = weakref.ref(trial)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        trial = self._trial()
        assert trial is not None
        heads, width = key_states.shape[1], key_states.shape[3]
        if (heads, width) != (value_states.shape[1], value_states.shape[3]):
            raise NoLayoutError(
                f"layer {layer_idx} keeps keys of {heads} heads of width {width}, values of {value_states.shape[1]} of "
                f"{value_states.shape[3]}"
            )
        trial.stored.append((layer_idx, heads, width))
        return key_states, value_states


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Record which layer attends with which mask; the result has the right shape and no meaning."""
    trial = _trial.get()
    assert trial is not None, f"{NAME} is for trials only"
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if causal is not True:
        raise NoLayoutError(f"one of its layers is not causal (is_causal is {causal})")
    groups = getattr(module, "num_key_value_groups", None)
    if groups is not None and groups * key.shape[1] != query.shape[1]:
        raise NoLayoutError(
            f"one of its layers has {query.shape[1]} heads for queries and {key.shape[1]} for keys, and num_key_value_groups "
            f"says {groups}"
        )
    origin = attention_mask.origin if isinstance(attention_mask, _Mask) else UNKNOWN
    trial.attended.append((len(trial.stored) - 1, origin))
    batch, heads, tokens, _ = query.shape
    return query.new_zeros(batch, tokens, heads, value.shape[-1]), None


def _mask(*args: Any, mask_function: Callable[..., Any] | None = None, **kwargs: Any) -> Tensor:
    trial = _trial.get()
    assert trial is not None, f"{NAME} is for trials only"
    trial.made.append(mask_function)
    return trial.new_mask(mask_function)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _window(function: Callable[..., Any] | None) -> int | None:
    """Return the window of a mask function of transformers; None where every position before the query is seen."""
    if function is None:
        return None
    widths = {_width(function, place) for place in PLACES}
    found = widths.pop()
    if widths or found == 0:
        raise NoLayoutError("its mask is neither causal nor a causal sliding window")
    return found


def _width(function: Callable[..., Any], place: int) -> int | None:
    """Return how many positions a query at `place` sees, its own included; None for all, 0 for any other pattern."""
    if not _sees(function, place, 0) or _sees(function, place, 1):
        return 0
    if _sees(function, place, -place):
        return None
    near, far = 0, place  # seen and not seen
    while far - near > 1:
        middle = (near + far) // 2
        near, far = (middle, far) if _sees(function, place, -middle) else (near, middle)
    return far


def _sees(function: Callable[..., Any], place: int, offset: int) -> bool:
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    return bool(function(zero, zero, zero + place, zero + place + offset))


def _twin(module: nn.Module, twins: dict[int, Any], kinds: set[Any]) -> Any:
    """Return a module of the same class with the same parameters, and so for the modules below it; without hooks, and with
    copies of the configurations that name the recording attention. The twin's forward cannot modify the model's attributes.

    Args:
        twins: of modules and configurations that were met before, by address.
        kinds: gets the implementations of attention that the configurations named.
    """
    known = twins.get(id(module))
    if known is not None:
        return known
    twin = twins[id(module)] = module.__class__.__new__(module.__class__)
    state = dict(vars(module))
    state.pop("_compiled_call_impl", None)  # bound to the module that was compiled; it computes the same as the forward
    for name, value in state.items():
        if name in _HOOKS:
            state[name] = type(value)()
        elif name in ("_parameters", "_buffers"):
            state[name] = dict(value)
        elif name == "_modules":
            state[name] = {
                child: None if below is None else _twin(below, twins, kinds) for child, below in value.items()
            }
    twin.__dict__.update(state)
    for name, value in state.items():
        if isinstance(value, PreTrainedConfig):
            twin.__dict__[name] = _own_config(value, twins, kinds)
        elif isinstance(value, types.MethodType) and id(value.__self__) in twins:
            twin.__dict__[name] = types.MethodType(value.__func__, twins[id(value.__self__)])
        elif isinstance(value, functools.partial):  # accelerate's hooks, which bring weights to their devices
            own = [twins.get(id(argument), argument) for argument in value.args]
            twin.__dict__[name] = functools.partial(value.func, *own, **value.keywords)
    if type(module) is nn.Linear and "forward" not in state:
        # What layers attend to does not depend on the matrix products, which take seconds in large models.
        twin.forward = functools.partial(_no_product, module.out_features)
    return twin


def _no_product(width: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], width)


_HOOKS = frozenset(name for name in vars(nn.Module()) if "hooks" in name)


def _own_config(config: PreTrainedConfig, twins: dict[int, Any], kinds: set[Any]) -> PreTrainedConfig:
    if id(config) not in twins:
        own = twins[id(config)] = copy.copy(config)
        kinds.add(config._attn_implementation)
        own._attn_implementation_internal = NAME
    return twins[id(config)]
