"""A tokenizer whose every word is one token, and a random model of its vocabulary."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(90)]
VOCABULARY = ["<eos>", "<bos>", "<unk>", "<user>", "<assistant>", "</turn>", *WORDS]


def build_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", model_max_length=64
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(adds_bos=True)


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Turns are ``<role> content </turn>``; a system turn is refused."""
    tokenizer = build_tokenizer(adds_bos=True)
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "<{{ m['role'] }}> {{ m['content'] }} </turn> "
        "{% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()
