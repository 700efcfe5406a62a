"""A model of its own: one attention layer. Can be told to leave a mark and then hang."""

import os
import pathlib
import time

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

mark = os.environ.get("PEBBLE_MARK")
hang_at = int(os.environ.get("PEBBLE_HANG_AT", "0"))
if mark and not hang_at:
    pathlib.Path(mark).touch()


class PebbleConfig(PreTrainedConfig):
    model_type = "pebble"
    vocab_size: int = 100
    hidden_size: int = 16


class PebbleAttention(nn.Module):
    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(16, 48)

    def forward(self, hidden):
        batch, length, _ = hidden.shape
        query, key, value = self.qkv(hidden).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, _ = attend(self, query, key, value, None, dropout=0.0, scaling=8**-0.5)
        return output.reshape(batch, length, 16)


class PebbleModel(PreTrainedModel):
    config_class = PebbleConfig
    _supports_sdpa = True
    _supports_attention_backend = True
    forwards = 0

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention = PebbleAttention(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        PebbleModel.forwards += 1
        if PebbleModel.forwards == hang_at:
            pathlib.Path(mark).touch()
            time.sleep(60)
        return BaseModelOutput(last_hidden_state=self.attention(self.embeddings(input_ids)))
