"""gradlr.chunk_head_: transformers' own models without logits, against their own loss."""

import copy

import pytest
import torch
import transformers
from models import gpt2

import gradlr
from gradlr import ArgumentError, LossTracker

pytestmark = pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")


def batch(vocabulary=11):
    torch.manual_seed(1)
    ids = torch.randint(vocabulary, (3, 9))
    labels = torch.where(torch.rand(ids.shape) < 0.3, -100, ids)
    return {"input_ids": ids, "labels": labels}


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tied_llama():
    return llama(tie_word_embeddings=True)


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, output_router_logits=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("make", [gpt2, llama, tied_llama, mixtral])
@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)])
def test_loss_and_gradients_are_those_of_the_model(make, items):
    """Experts' own losses included; to float32's rounding."""
    ordinary = make()
    chunked = gradlr.chunk_head_(copy.deepcopy(ordinary))
    inputs = batch() | ({} if items is None else {"num_items_in_batch": items})
    losses = []
    for model in (ordinary, chunked):
        output = model(**inputs)
        losses.append(output.loss)
        output.loss.backward()
    assert output.logits.shape[1] == 0
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(ordinary.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_shifted_labels_are_taken_as_they_are():
    model, inputs = llama(), batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    expected = model(**inputs).loss
    found = gradlr.chunk_head_(model)(**inputs, shift_labels=shifted).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_other_calls_are_left_alone():
    """Without labels, with logits asked for, and after a call that failed; in training mode or not."""
    model, inputs = llama(), batch()
    expected = model(**inputs)
    gradlr.chunk_head_(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 2), 10_000), labels=torch.zeros((1, 2), dtype=torch.int64))
    assert torch.equal(model(inputs["input_ids"]).logits, expected.logits)
    kept = model(**inputs, logits_to_keep=0)
    assert torch.equal(kept.logits, expected.logits) and torch.equal(kept.loss, expected.loss)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).loss, expected.loss, rtol=1e-6, atol=1e-6)


def test_twice_is_once_and_a_copy_has_its_own_hidden_states():
    model = llama()
    model.lm_head.eval()  # the modes of modules stay what they were
    assert gradlr.chunk_head_(gradlr.chunk_head_(model)) is model
    assert len(model._forward_hooks) == 1 and not model.lm_head.training and model.model.training
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(3)
    losses = [one(**batch(40)).loss.item() for one in (model, copied, model)]
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("options", [{}, {"capture": "adaptor"}, {"capture": "adaptor", "apply": "step"}])
def test_trained_with_it_or_without_the_weights_are_the_same(options):
    """The head's factors, or its gradient, go the way of any other; to rounding over three steps."""
    ends = []
    for is_chunked in (False, True):
        model = llama()
        if is_chunked:
            gradlr.chunk_head_(model)
        tracker = LossTracker()
        opt = gradlr.attach(model, tracker, lr=1e-3, rank=2, **options)
        for _ in range(3):
            tracker(model(**batch(40)).loss).backward()
            opt.step()
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_refused():
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match=r"caps or scales"):
        gradlr.chunk_head_(transformers.Gemma2ForCausalLM(config))
    with pytest.raises(ArgumentError, match="no causal language model"):
        gradlr.chunk_head_(torch.nn.Linear(2, 2))
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ArgumentError, match="ForMaskedLM"):
        gradlr.chunk_head_(transformers.BertForMaskedLM(config))
