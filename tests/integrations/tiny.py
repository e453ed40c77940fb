"""Models and a tokenizer for the trainers' tests, made on the spot: nothing is downloaded."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SPECIAL = ("<pad>", "<eos>", "<unk>")
WORDS = 37


def word_tokenizer():
    """Each of the words w0, w1, ... is a token."""
    names = [*SPECIAL, *(f"w{index}" for index in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def words(*numbers):
    return " ".join(f"w{number % WORDS}" for number in numbers)


def llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + WORDS, max_position_embeddings=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, use_cache=False, bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trainable(*modules):
    """name → copy of each trainable parameter, once."""
    found = {f"{index}.{name}": one for index, module in enumerate(modules) for name, one in module.named_parameters()}
    seen = {id(one): name for name, one in reversed(found.items()) if one.requires_grad}
    return {name: found[name].detach().clone() for name in seen.values()}


def unmoved(before, *modules):
    """Names of the parameters that are as they were."""
    now = trainable(*modules)
    assert now.keys() == before.keys()
    return [name for name in before if torch.equal(before[name], now[name])]


def bag_of_words(width=16):
    """An encoder that takes the mean of its words' vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    module = StaticEmbedding(word_tokenizer().backend_tokenizer, embedding_dim=width)
    return SentenceTransformer(modules=[module], device="cpu")
