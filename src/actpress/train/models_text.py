"""Networks that read token ids, from transformers (an optional extra), with random weights.

They stand beside the image classifiers of models.py where memory is measured: built from a configuration alone, nothing is downloaded.
Each tells what it reads: `example_input(batch)`. Attention is scaled_dot_product_attention.

name       network                                                                            tokens
bert_base  BERT-base classifier: 12 layers, 768 hidden, 3072 in the MLP, GELU                  512
mistral    Mistral-7B's layers: 4096 hidden, 14336 in the SwiGLU MLP, 32 heads, 8 of keys     4096
Shapes: ids_NL int64, logits_NK, K = num_classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class TextClassifier(nn.Module):
    """ids_NL -> logits_NK of the last token."""

    def __init__(self, encoder: nn.Module, hidden: int, num_classes: int, tokens: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden, num_classes)
        self.tokens = tokens

    def forward(self, ids_NL: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=ids_NL).last_hidden_state[:, -1])

    def example_input(self, batch: int) -> Tensor:
        """Zeros in the shape of a batch of ids_NL."""
        return torch.zeros(batch, self.tokens, dtype=torch.long)


def bert_base(layers: int, dropout: float) -> tuple[nn.Module, int]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=layers,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False), config.hidden_size


class MistralLayers(nn.Module):
    """Embedding and layers of Mistral, causal attention without a mask tensor. (transformers' own model makes a mask when its
    tensors are fake, since it cannot look into them; with real ones it makes none.)"""

    def __init__(self, config) -> None:
        from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRotaryEmbedding

        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = MistralRotaryEmbedding(config)
        self.layers = nn.ModuleList(MistralDecoderLayer(config, i) for i in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor) -> "Hidden":
        hidden_NLH = self.embedding(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotation = self.rotary(hidden_NLH, positions)
        for layer in self.layers:
            hidden_NLH = layer(hidden_NLH, attention_mask=None, position_embeddings=rotation)
        return Hidden(hidden_NLH)


class Hidden(NamedTuple):
    last_hidden_state: Tensor


def mistral(layers: int, dropout: float) -> tuple[nn.Module, int]:
    from transformers import MistralConfig

    config = MistralConfig(
        num_hidden_layers=layers, attention_dropout=dropout, attn_implementation="sdpa", sliding_window=None
    )
    return MistralLayers(config), config.hidden_size


BUILDERS: dict[str, Callable[[int, float], tuple[nn.Module, int]]] = {"bert_base": bert_base, "mistral": mistral}


def create(name: str, num_classes: int, tokens: int, layers: int, dropout: float = 0.0) -> nn.Module:
    """A classifier of sequences of `tokens` ids, with `layers` layers.

    Raises ValueError for an unknown name, ImportError if transformers is not installed.
    """
    if name not in BUILDERS:
        raise ValueError(f"text model {name!r} is unknown; allowed: {', '.join(BUILDERS)}")
    encoder, hidden = BUILDERS[name](layers, dropout)
    return TextClassifier(encoder, hidden, num_classes, tokens)
