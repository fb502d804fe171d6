"""`T5Encoder`: the states of transformers' model for padded texts, read by a network of another width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fastdiff import Sampler
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.text import T5Encoder
from tests.support.captioned import network_and_encoder

WORDS = ("<pad>", "</s>", "<unk>", "a", "dog", "cat", "red", "sea")


def tokenizer(**options: Any) -> Any:
    """A tokenizer of a few words, which like T5's marks the end of a text alone."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    described = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=made, **described)


def model(**changes: Any) -> Any:
    described = {"vocab_size": len(WORDS), "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T5EncoderModel(T5Config(**{**described, "feed_forward_proj": "gated-gelu", **changes})).eval()


def test_the_states_are_those_of_transformers():
    encoder = T5Encoder(model(), tokenizer(), tokens=9)
    for text in ("a red dog", "", "a cat sea dog red a cat sea"):
        given = tokenizer()(text, padding="max_length", max_length=9, return_tensors="pt")
        assert encoder.tokenize(text) == given["input_ids"][0].tolist()
        with torch.no_grad():
            expected = encoder.model(given["input_ids"], attention_mask=given["attention_mask"])[0]
            unmasked = encoder.model(given["input_ids"])[0]
        states, pooled = encoder.encode(text)
        assert pooled is None
        assert torch.equal(states, expected[0])
        assert (given["attention_mask"].all()) == torch.equal(states, unmasked[0])  # the mask matters


def test_a_network_that_reads_t5():
    unet, _ = network_and_encoder(
        class_embed_type=None, projection_class_embeddings_input_dim=None, encoder_hid_dim=24,
        encoder_hid_dim_type="text_proj",
    )  # fmt: skip
    encoder = T5Encoder(model(), tokenizer(), tokens=9)
    sampler = Sampler(unet, text_encoder=encoder)
    call = {"steps": 2, "guidance": 3.0}
    expected = sampler.sample(2, prompts=["a red dog", "sea"], **call).images
    context = sampler.encode(["a red dog", "sea"])
    assert context.states.shape == (2, 9, 24)
    assert torch.equal(sampler.sample(2, context=context, negative="", **call).images, expected)
    assert not torch.equal(sampler.sample(2, prompts=["a cat", "sea"], **call).images[0], expected[0])


def test_what_is_refused():
    encoder = T5Encoder(model(), tokenizer(), tokens=4)
    with pytest.raises(InvalidArgument, match="4 pieces of words; at most 3 fit"):
        encoder.tokenize("a red dog sea")
    with pytest.raises(InvalidArgument, match="text"):
        encoder.tokenize(b"a dog")  # type: ignore[arg-type]
    for tokens in (1, 0, "77", None, 2.5):
        with pytest.raises(InvalidArgument, match="tokens="):
            T5Encoder(model(), tokenizer(), tokens=tokens)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="padding_side='left'"):
        T5Encoder(model(), tokenizer(padding_side="left"))
    with pytest.raises(ConfigError, match="has 8 tokens, the text encoder 5"):
        T5Encoder(model(vocab_size=5), tokenizer())
