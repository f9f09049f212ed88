"""What tests of the language model share: tokens, a corpus of random letters, and the file of an experiment."""

import numpy as np
import torch

from examples.language_model.corpus import Corpus, Texts


def drawn(batch, length, seed=1):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


def _texts(seed):
    data = np.random.default_rng(seed).integers(97, 123, 5000).astype(np.uint8)
    return Texts(data, np.array([0, 2000, 5000]), ("a", "b"))


CORPUS = Corpus(_texts(0), _texts(1), "5ha")


def config(layers, memories, steps, length):
    return f"""
[model]
width = 16
layers = {layers}
heads = 2
window = 8
hidden = 16
memories = {memories}
memory = {{ num_subkeys = 8, top_k = 2, chunk_size = 64 }}
[training]
steps = {steps}
batch = 2
length = {length}
facts = 0.3
warmup = 2
"""
