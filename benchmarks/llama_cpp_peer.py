"""llama.cpp as a peer on the CPU, by the low-level calls of llama-cpp-python (optional: pip install llama-cpp-python).

The model's own weights are written to a GGUF file in their dtype. Latent steps go in as embeddings and come out as states
after the final norm (embeddings on, no pooling); whether llama.cpp runs the lm_head beside them is its own affair.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from torch import Tensor

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(model: Any, path: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: Tensor) -> None:
        if tensor.dim() == 1 or tensor.dtype == torch.float32:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
            return
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd.weight", model.get_input_embeddings().weight.detach())
    add("output_norm.weight", model.model.norm.weight.detach())
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        add("output.weight", model.lm_head.weight.detach())
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in PARTS.items():
            for kind, tensor in layer.get_submodule(ours).named_parameters():
                value = tensor.detach()
                if config.model_type == "llama" and ours.endswith(("q_proj", "k_proj")):
                    # llama.cpp rotates neighbours where transformers rotates halves.
                    heads = value.view(-1, 2, width // 2, *value.shape[1:])
                    value = heads.transpose(1, 2).reshape(value.shape)
                add(f"blk.{index}.{theirs}.{kind}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """One sequence."""

    def __init__(self, model: Any, target_norm: float, slots: int, folder: Path) -> None:
        path = folder / "model.gguf"
        write_gguf(model, path)
        self.width, self.target_norm = model.config.hidden_size, target_norm
        self.vocabulary = model.config.vocab_size
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = slots, 512, 512
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.embeddings, params.pooling_type = True, llama_cpp.LLAMA_POOLING_TYPE_NONE
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.model or not self.context:
            raise RuntimeError("llama.cpp could not load what was written for it")
        self.length = 0

    def _decode(self, count: int, tokens: list[int] | None, embeds: np.ndarray | None) -> None:
        batch = llama_cpp.llama_batch_init(count, 0 if embeds is None else self.width, 1)
        batch.n_tokens = count
        for i in range(count):
            if tokens is not None:
                batch.token[i] = tokens[i]
            batch.pos[i] = self.length + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i + 1 == count
        if embeds is not None:
            ctypes.memmove(batch.embd, embeds.ctypes.data, embeds.nbytes)
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        self.length += count

    def _state(self) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_ith(self.context, -1), (self.width,)).copy()

    def prefill(self, ids: Tensor) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.length = 0
        self._decode(ids.shape[1], ids[0].tolist(), None)
        self.hidden = self._state()

    def latent(self, steps: int) -> Tensor:
        latents = []
        for _ in range(steps):
            latents.append((self.hidden * (self.target_norm / np.linalg.norm(self.hidden))).astype(np.float32))
            self._decode(1, None, latents[-1])
            self.hidden = self._state()
        return torch.from_numpy(np.stack(latents))[None]

    def token(self, token: Tensor, steps: int) -> Tensor:
        chosen = int(token[0])
        for _ in range(steps):
            self._decode(1, [chosen], None)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocabulary,))
            chosen = int(logits.argmax())
        return torch.from_numpy(logits.copy())[None]
