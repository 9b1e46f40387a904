"""Fixtures shared by all tests: one thread a process, no network, a tiny untrained base model on disk."""

import io
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a model hub must fail at once

import pytest
import sentencepiece
import torch

TINY_CAPTIONS = [
    "A red car drives along a sandy desert road under a clear sky with distant mesas on the horizon.",
    "A blue car rolls through snow while fog hides the far hills and the road bends to the left.",
    "At night a white car passes neon towers in the city, rain falling on the wet asphalt ahead.",
    "A green car follows a straight road between grass fields, clouds over low hills in the distance.",
]


@pytest.fixture(autouse=True, scope="session")
def _single_thread():
    torch.set_num_threads(1)  # pytest-xdist runs one process a core; more threads only fight


def make_tiny_tokenizer():
    """A T5 tokenizer over a few captions. From pieces: vocab_file= would silently make a vocabulary of 4."""
    from transformers import T5Tokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_CAPTIONS * 4), model_writer=model, vocab_size=96, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=64)


def make_tiny_components(seed: int = 0, rotary: bool = False) -> dict:
    """Untrained components of a CogVideoX pipeline, few parameters each; 32×48 pixels, 33 frames."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(seed)
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)
    ).eval()
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        sample_height=32, sample_width=48,
    ).eval()  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=4, time_embed_dim=16, text_embed_dim=24,
        max_text_seq_length=16, sample_height=4, sample_width=6, sample_frames=33,
        use_rotary_positional_embeddings=rotary,
    ).eval()  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        snr_shift_scale=3.0, rescale_betas_zero_snr=True, prediction_type="v_prediction",
        timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": vae,
        "transformer": transformer,
        "scheduler": scheduler,
    }


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """Directory of a tiny plain CogVideoX pipeline (sincos positions, as the 2B). Read only."""
    from diffusers import CogVideoXPipeline

    path = tmp_path_factory.mktemp("tiny_base")
    CogVideoXPipeline(**make_tiny_components()).save_pretrained(path)
    return str(path)
