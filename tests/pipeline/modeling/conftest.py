"""Tiny random models of each family: two layers, hidden 64, 4 query heads (a Llama's share 2 key/value heads)."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hedgehog.pipeline.families import FAMILIES

PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_llama(**overrides) -> LlamaForCausalLM:
    """A random Llama, large enough in its weights that attention is far from uniform."""
    fields = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.15,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**fields, **overrides})).eval()


def make_gpt2(**overrides) -> GPT2LMHeadModel:
    """The same of a GPT-2; key/value heads are as many as query heads, whatever is asked. No dropout."""
    fields = {
        "vocab_size": 61,
        "n_embd": 64,
        "n_inner": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "n_positions": 128,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.3,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,
    }
    overrides.pop("num_key_value_heads", None)
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{**fields, **overrides})).eval()


@pytest.fixture(params=sorted(name for name, family in FAMILIES.items() if not family.is_encoder))
def family(request) -> str:
    return request.param


@pytest.fixture
def new_base(family):
    """new_base(**config fields), in transformers' usual names: a model of each family."""
    return {"llama": make_llama, "gpt2": make_gpt2}[family]


@pytest.fixture
def base(new_base) -> PreTrainedModel:
    return new_base()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return make_gpt2()


@pytest.fixture
def new_gpt2():
    """new_gpt2(**config fields)"""
    return make_gpt2


@pytest.fixture
def new_llama():
    """new_llama(**config fields)"""
    return make_llama


@pytest.fixture
def token_ids():
    """token_ids(batch, length, seed=0): random ids without special tokens."""

    def make(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 61, (batch_size, length), generator=generator)

    return make


@pytest.fixture
def left_padded():
    """left_padded([ids, …]) → (ids_BL, mask_BL), padded on the left to the longest."""

    def make(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(len(row) for row in rows)
        ids_BL = torch.full((len(rows), length), PAD)
        mask_BL = torch.zeros(len(rows), length, dtype=torch.long)
        for index, row in enumerate(rows):
            ids_BL[index, length - len(row) :] = row
            mask_BL[index, length - len(row) :] = 1
        return ids_BL, mask_BL

    return make
