"""The mini base model's text side: a tokenizer trained on the captions and a small T5 encoder that is never trained."""

from __future__ import annotations

import io
import math
import string
from collections import Counter
from collections.abc import Sequence

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

MAX_TEXT_LENGTH = 64  # tokens; a mini-world caption needs at most about 60
TEXT_DIM = 128


def train_tokenizer(captions: Sequence[str], vocab_size: int = 400) -> T5Tokenizer:
    """A sentencepiece unigram tokenizer of the captions' words, as a T5Tokenizer that saves and reloads as itself.

    All printable ASCII is in the vocabulary, so a prompt in other words still has tokens. `vocab_size` is an upper
    limit for the pieces below words.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,  # the same captions give the same pieces
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    # From the file, T5Tokenizer would make a vocabulary of its own four special tokens; from pieces it keeps them all.
    vocabulary = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.get_piece_size())}
    # Trained on little text, the unigram model prefers a few short pieces, and a caption would take 80 tokens or more.
    # With the captions' words as pieces of their own, scored by their frequency, it takes about one token a word.
    words = Counter(word.strip(string.punctuation) for caption in captions for word in caption.split())
    for word, count in sorted(words.items()):
        vocabulary.setdefault(f"▁{word}", math.log(count / words.total()))
    return T5Tokenizer(vocab=list(vocabulary.items()), extra_ids=0, model_max_length=MAX_TEXT_LENGTH)


def make_text_encoder(vocab_size: int, seed: int) -> T5EncoderModel:
    """A two-layer T5 encoder with T5's own initialisation, frozen.

    It is random on purpose. With T5's scaling every token's embedding (unit variance) stays in the residual stream,
    and each layer mixes in the others', weighted by relative position: captions that differ in one word give
    different sequences, which the transformer's own trained text projection can read as well as it could a trained
    encoder's. What it lacks is meaning for words no caption uses, and a few hundred captions could not teach that
    either.
    """
    config = T5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = T5EncoderModel(config)
    return encoder.eval().requires_grad_(False)
