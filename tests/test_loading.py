"""A model by name: where it is put, in which dtype, and what is said of one that cannot run."""

import pytest
import torch
from latentmas.loading import check_placement, load_model, load_skeleton
from tiny_models import tiny_config, tiny_model
from tokenizers_offline import character_tokenizer
from transformers import BertConfig, BertLMHeadModel

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import UnsupportedModelError

no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint in bfloat16."""
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "want"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_dtype(folder, dtype, want):
    model, tokenizer = load_model(folder, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {want}
    assert not model.training
    assert tokenizer("ab", add_special_tokens=False).input_ids == [4, 5]


@no_accelerator
@pytest.mark.parametrize("device", [None, "cpu", "cpu:0"])
def test_devices_that_are_there(device):
    assert check_placement("auto", device) == torch.device("cpu")


@no_accelerator
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "cpu:1", "meta"])
def test_devices_that_are_not_there(device):
    with pytest.raises(ValueError, match=f"device '{device}' is not there; here are cpu$"):
        check_placement("auto", device)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cpu "])
def test_devices_that_are_none(device):
    with pytest.raises(ValueError, match=f"got device '{device}'; here are cpu"):
        check_placement("auto", device)


def test_dtypes_that_are_none():
    with pytest.raises(ValueError, match="got dtype 'int8'; supported are auto, float32, bfloat16, float16"):
        check_placement("int8", None)


def test_an_encoder_is_refused(tmp_path):
    """BERT loads as a causal LM, with a word in the log, and sees what comes: it would answer nonsense."""
    config = BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    BertLMHeadModel(config).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"BertLMHeadModel \(bert\) attends in both directions; .*is_decoder=True"
    ):
        load_model(str(tmp_path))


def test_a_damaged_file_of_weights_is_one_line(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot load .*: the folder gave: ") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_skeleton_needs_no_weights(tmp_path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    model = load_skeleton(str(tmp_path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not model.training


def test_a_model_whose_package_is_not_installed_is_one_line(folder, monkeypatch):
    """Quantised checkpoints and some tokenizers need one; transformers raises ImportError."""

    def load(*arguments, **options):
        raise ImportError("this needs the package frob:\npip install frob")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    with pytest.raises(LatentMASError, match="cannot load .*: the folder gave: this needs the package frob"):
        load_model(folder)
