"""Stage 2's control vocabulary from a CLIP text encoder, against transformers' own features of each sentence."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from common.cogvideox.control_adapter import ControlVocabulary
from common.config.errors import UserError
from common.data.control_signals import CONTROL_TOKENS
from stage2.training.control import SENTENCES, ControlSettings
from tests.conftest import write_tiny_clip

DIM = 12


@pytest.fixture(scope="module", params=["published", "exact"])
def clip(request, tmp_path_factory) -> Path:
    """A tiny random CLIP text encoder. `eos_token_id` is 2 in published configs, which stands for the highest id."""
    path = tmp_path_factory.mktemp("clip")
    write_tiny_clip(path, DIM, published_eos=request.param == "published")
    return path


@torch.no_grad()
def feature(clip: Path, sentence: str) -> torch.Tensor:
    """The sentence's projected feature, of the sentence ALONE."""
    tokens = CLIPTokenizer.from_pretrained(clip)(sentence, return_tensors="pt")
    return CLIPTextModelWithProjection.from_pretrained(clip).eval()(**tokens).text_embeds[0]


def settings(clip: Path, **more: object) -> ControlSettings:
    return ControlSettings(control_text_encoder=str(clip), control_dim=DIM, **more)


def test_rows_are_the_features_of_the_sentences_and_null_is_that_of_the_empty_one(clip):
    sentences = {"D": "the car", "DL": "the car drives ahead and turns left", "N": "x"}
    vocabulary = ControlVocabulary.from_clip(sentences, str(clip))
    assert vocabulary.names == ["D", "DL", "N"] and vocabulary.control_dim == DIM
    for row, sentence in zip([*vocabulary.table, vocabulary.null], [*sentences.values(), ""], strict=True):
        torch.testing.assert_close(row, feature(clip, sentence), rtol=0, atol=1e-6)
    assert torch.pdist(torch.cat([vocabulary.table, vocabulary.null[None]])).min() > 0.1


def test_stage_2_takes_its_own_sentences_in_index_order(clip, tmp_path):
    vocabulary = settings(clip).build_objective().make_vocabulary()
    assert vocabulary.names == list(CONTROL_TOKENS)
    torch.testing.assert_close(vocabulary.table[4], feature(clip, SENTENCES["BL"]), rtol=0, atol=1e-6)
    vocabulary.save_pretrained(tmp_path)
    again = ControlVocabulary.from_pretrained(tmp_path)
    assert again.names == vocabulary.names and torch.equal(
        again.embed(torch.arange(-1, 9)), vocabulary.embed(torch.arange(-1, 9))
    )


def test_a_sentences_file_in_another_order(clip, tmp_path):
    file = tmp_path / "sentences.json"
    sentences = {token: f"signal {token.lower()}" for token in reversed(CONTROL_TOKENS)}
    file.write_text(json.dumps(sentences))
    vocabulary = settings(clip, control_sentences_file=str(file)).build_objective().make_vocabulary()
    assert vocabulary.names == list(CONTROL_TOKENS)
    for token in ("D", "BR", "NR"):
        row = vocabulary.embed(vocabulary.indices([token]))[0]
        torch.testing.assert_close(row, feature(clip, sentences[token]), rtol=0, atol=1e-6)
    del sentences["BR"]
    file.write_text(json.dumps(sentences))
    with pytest.raises(UserError, match="has no sentence for BR"):
        settings(clip, control_sentences_file=str(file)).build_objective().make_vocabulary()


def test_another_width_and_no_clip_at_all_are_refused(clip, tiny_base):
    wide = ControlSettings(control_text_encoder=str(clip), control_dim=768)
    with pytest.raises(UserError, match=f"control_dim: is 768; .* makes {DIM}"):
        wide.build_objective().make_vocabulary()
    with pytest.raises(UserError, match="no CLIP text encoder could be loaded"):
        ControlVocabulary.from_clip(SENTENCES, tiny_base)
