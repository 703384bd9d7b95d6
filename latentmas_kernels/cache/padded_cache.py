"""PaddedCache: a transformers DynamicCache whose padding can be read off its keys and values, row by row."""

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, masking_utils

from latentmas_kernels.errors import LatentMASError


class _Forward(NamedTuple):
    """A forward whose mask was seen.

    start: columns before it.
    real: bool [B or 1, T], which of its columns are tokens.
    padded: whether some are not; read once, since reading it in every layer would wait for the device each time.
    """

    start: int
    real: Tensor
    padded: bool


class PaddedCache(DynamicCache):
    """A DynamicCache in which columns of padding hold zeros as keys and values, in every layer.

    No token has such keys and values here: where the keys of a token are zeros in the first layer, since its embedding is zero,
    their first number becomes the dtype's smallest normal one (`update`), too small to change attention. So the padding follows
    from the numbers alone: it is still known after `update`, `reorder_cache`, `batch_select_indices`,
    `batch_repeat_interleave`, `crop`, a copy, or a program that cuts or gathers the tensors by hand. Every row has the
    positions 0, 1, 2, ... over its real columns.

    Where the cache is the past of a plain transformers model, in `model(...)` and in `model.generate(...)`, transformers' mask
    functions show it the mask that they got: padding that the mask leaves out is filled in, and what would change the texts is
    a LatentMASError (a mask that contradicts the cache, positions that were counted over padding). Needs layers that keep all
    columns.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "PaddedCache":
        ask_about_masks()
        return super().__new__(cls)

    _forward: _Forward | None = None  # the last one whose mask was seen

    def attention_mask(self, new: Tensor | None = None) -> Tensor:
        """Return int64 [B, columns (+ T)]: the mask of the cached columns, followed by the mask [B, T] of new tokens. This does
        not modify the cache.

        Raises:
            LatentMASError: for an empty cache, which has no rows yet.
        """
        real = real_columns(self)
        if real is None:
            raise LatentMASError(
                f"an empty {type(self).__name__} has no rows to mask; pass the mask of the new tokens alone"
            )
        return real.long() if new is None else torch.cat([real.long(), new.to(real.device).long()], dim=1)

    def expect(self, real: Tensor) -> None:
        """Set which columns of the next `update` of all layers are real, bool [B, T]. This modifies the cache."""
        self._forward = _Forward(self.get_seq_length(), real, not bool(real.all()))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append as in transformers; columns of padding, and no others, are stored as zeros. This modifies the cache."""
        columns, known = key_states.shape[2], self._forward
        if known is None or known.real.shape[1] != columns or known.start != self.get_seq_length(layer_idx):
            real = real_columns(self) if layer_idx == 0 else None
            if real is not None and not bool(real.all()):
                raise LatentMASError(
                    f"this cache holds padding ({_counts(real)} tokens in {real.shape[1]} columns), and the model did not ask "
                    "transformers' mask functions for a mask that leaves it out. Give transformers a mask of two dimensions, "
                    "attention_mask=cache.attention_mask(new), or use latentmas_kernels.generate()"
                )
        elif layer_idx == 0 or known.padded:
            real = known.real[:, None, :, None].to(key_states.device)
            if layer_idx == 0:
                zero = (key_states == 0).all(-1, keepdim=True).all(1, keepdim=True)
                smallest = torch.zeros_like(key_states[:1, :1, :1])
                smallest[..., 0] = torch.finfo(key_states.dtype).tiny
                key_states = torch.where(zero & real, smallest, key_states)
            if known.padded:
                key_states, value_states = key_states.masked_fill(~real, 0), value_states.masked_fill(~real, 0)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def look_at(
        self, mask: Tensor | None, columns: int, positions: Tensor | None, window: int | None = None
    ) -> Tensor | None:
        """Return the mask that a forward over `columns` new columns must have, given the one that it got. This modifies the
        cache: the next `update` uses the mask.

        Which columns are padding is read off the keys and values of two layers each time, and not kept: a program may change
        the tensors between two forwards unseen. The attention that follows reads all layers.

        Args:
            mask: [B, columns] or [B, held + columns], 0 for padding, or None. Any other (of four dimensions, or one per layer
                type) is passed on unread where the cache holds no padding, and all new columns are stored as tokens; where it
                holds some, such a mask is a LatentMASError.
            positions: of the new columns, [1 or B, columns], or None where the model gives none.
            window: the configuration's sliding window. transformers counts it in columns, so padding between tokens uses it up.

        Raises:
            LatentMASError: where the mask contradicts the cached columns, positions were not counted over the real columns, or
                a window would be used up.
        """
        held, self._forward = real_columns(self), None
        two = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if isinstance(mask, Tensor) and two and self.get_seq_length() == 0:  # its first columns may be padding as well
            held = torch.zeros(len(mask), 0, dtype=torch.bool, device=mask.device)
        if held is None and self.get_seq_length() == 0:
            self._forward = _Forward(0, torch.ones(1, columns, dtype=torch.bool), padded=False)
        if held is None or (not two and bool(held.all())):
            return mask
        width = held.shape[1]
        new = torch.ones(len(held), columns, dtype=torch.bool, device=held.device)
        if mask is not None:
            new_only, both = [len(held), columns], [len(held), width + columns]
            if list(mask.shape) not in (new_only, both):
                raise LatentMASError(
                    f"attention_mask must be {new_only} (new tokens) or {both} (past + new) behind this cache of "
                    f"{_counts(held)} tokens in {width} columns; got {list(mask.shape)}. attention_mask(new) of it gives "
                    "the second"
                )
            given = mask.to(held.device) != 0
            if given.shape[1] != columns:
                check_agrees(held, given[:, :width])
            new = given[:, -columns:]
        full = torch.cat([held, new], dim=1)
        whole = bool(full.all())
        self._forward = _Forward(width, new, padded=not whole and not bool(new.all()))
        if whole:
            return mask
        counted = (full.long().cumsum(1) - 1)[:, width:]
        if positions is None:
            if mask is None or mask.shape[1] == columns:
                raise LatentMASError(
                    f"the cache holds {_counts(held)} tokens in {width} columns, the others are padding, and this model makes "
                    "no positions that could tell: pass attention_mask=cache.attention_mask(new)"
                )
        elif positions.shape[-1] != columns or bool((positions.to(held.device) != counted)[..., new].any()):
            raise LatentMASError(
                f"this forward has {columns} new columns and position_ids that begin with "
                f"{positions[..., :1].flatten().tolist()}; behind {_counts(held)} cached tokens (of {width} columns, the "
                "others are padding) each row's new tokens must begin there. Pass attention_mask=cache.attention_mask(new) to "
                "generate(), which counts them from it, and to a plain forward position_ids as well: "
                "(mask.cumsum(1) - 1)[:, -new.shape[1]:]"
            )
        _check_window(full, window)
        return full.to(dtype=torch.int64)


def real_columns(cache: Cache) -> Tensor | None:
    """Return bool [B, columns] on the cache's device: which columns of each row are tokens, and not zeros in place of padding.
    This does not modify the cache.

    The first and the last layer that the model runs show it: a token whose embedding is zero has zeros in the first one, and
    something of what it attended to in the last one. Where it attended to nothing else, as the first token of a row, it has
    zeros in every layer of a model without biases. A PaddedCache marks such tokens (`PaddedCache.update`). In any other cache
    they look like padding: `LatentCache.from_hf` warns, and takes a mask that decides.

    None for an empty cache, and where some layer does not keep plain keys and values of all columns. Layers that are not run
    (`is_gap`) do not count.
    """
    length = int(cache.get_seq_length()) if cache.layers else 0
    layers: list[Any] = [layer for layer in cache.layers if keeps(layer, length) or not is_gap(layer)]
    if not length or not all(keeps(layer, length) for layer in layers):
        return None
    real: Any = False
    for layer in (layers[0], layers[-1]):
        for states in (layer.keys, layer.values):
            real = real | (states[:, :, :length] != 0).any(-1).any(1).to(layers[0].keys.device)
            if bool(real.all()):  # with the first one, as a rule
                return real
    return real


def is_gap(layer: Any) -> bool:
    """Return whether a layer without all columns of its cache is the place of one that the model does not run.

    Nothing was ever written there, or zeros, and fewer columns than in the other layers.
    """
    if not getattr(layer, "is_initialized", True):
        return True
    if not keeps(layer, 0) or int(layer.get_seq_length()) > layer.keys.shape[2]:
        return False  # it has had other keys: quantized ones, or some that a window dropped
    return not bool(layer.keys.any()) and not bool(layer.values.any())


def keeps(layer: Any, length: int) -> bool:
    """Return whether a layer holds plain keys and values [B, H, S, D] of `length` columns or more."""
    states = getattr(layer, "keys", None), getattr(layer, "values", None)
    return all(isinstance(s, Tensor) and s.dim() == 4 and s.shape[2] >= length for s in states)


def check_agrees(
    held: Tensor,
    given: Tensor,
    remedy: str = "Pass the mask of the new tokens alone, or past and new as attention_mask(new) of the cache gives it",
) -> None:
    """Raise LatentMASError where a mask over the past is not that of the cache's padding; both bool [B, columns]."""
    if not torch.equal(held, given.to(held.device)):
        raise LatentMASError(
            f"attention_mask has {_counts(given)} ones over the past, but the cache holds {_counts(held)} tokens in its "
            f"{held.shape[1]} columns, the others are padding. {remedy}"
        )


def _check_window(full: Tensor, window: int | None) -> None:
    """Raise LatentMASError where a row, bool [B, columns], has padding between its tokens and is longer than the window."""
    if not isinstance(window, int):
        return
    column = torch.arange(full.shape[1], device=full.device)
    first, last = full.int().argmax(1), (full * column).argmax(1)
    length = last - first + 1
    wrong = (length > full.sum(1)) & (length > window)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise LatentMASError(
            f"row {row} has {int(full[row].sum())} tokens in {int(length[row])} columns, with padding between them, and "
            f"transformers counts the sliding window of {window} in columns: the padding would use it up. Give new tokens of "
            "one length, or use latentmas_kernels.generate()"
        )


def _counts(real: Tensor) -> list[int]:
    return real.sum(1).tolist()


@functools.cache
def ask_about_masks() -> None:
    """Patch transformers' mask functions to pass the mask that they got to the `look_at` of a cache that has one; other calls
    are unchanged.

    transformers itself reads the sizes of a cache, never its padding. Where a later version has no such function, `update` of a
    PaddedCache refuses padding.
    """
    original = getattr(masking_utils, "_preprocess_mask_arguments", None)
    if original is None:
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def asked(*args: Any, **kwargs: Any) -> Any:
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, Cache) and hasattr(cache, "look_at"):
                call = signature.bind(*args, **kwargs)
                given = call.arguments
                columns, positions = given["inputs_embeds"].shape[1], given.get("position_ids")
                window = getattr(given["config"], "sliding_window", None)
                given["attention_mask"] = cache.look_at(given["attention_mask"], columns, positions, window)
                return original(*call.args, **call.kwargs)
        return original(*args, **kwargs)

    masking_utils._preprocess_mask_arguments = asked
