"""Fixtures shared by all tests: one thread a process, no network, a tiny untrained base model on disk."""

import io
import json
import os
import re
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a model hub must fail at once

import pytest
import sentencepiece
import torch
import torch.distributed as dist

from common.config.errors import run_cli
from common.data.control_signals import CONTROL_TOKENS

ROOT = Path(__file__).parents[1]

TINY_CAPTIONS = [
    "A red car drives along a sandy desert road under a clear sky with distant mesas on the horizon.",
    "A blue car rolls through snow while fog hides the far hills and the road bends to the left.",
    "At night a white car passes neon towers in the city, rain falling on the wet asphalt ahead.",
    "A green car follows a straight road between grass fields, clouds over low hills in the distance.",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left alone with one in the end (--no-loadscope-reorder)."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _single_thread():
    torch.set_num_threads(1)  # pytest-xdist runs one process a core; more threads only fight


@pytest.fixture
def traced(monkeypatch):
    """Has compiled modules run by a backend that only traces: making C++ of them would take minutes."""
    compile_ = torch.nn.Module.compile
    quick = {"backend": "aot_eager", "options": None}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: compile_(self, **(more | quick)))
    yield
    torch.compiler.reset()


@pytest.fixture
def one_process_group(tmp_path):
    """Collectives of this process with itself, as sharded modules need them."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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


def write_tiny_clip(path: Path, dim: int, published_eos: bool = True) -> None:
    """A random CLIP text encoder with features of `dim` numbers, and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>", "ca", "car</w>"]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (path / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\nc a\nca r</w>\n")
    CLIPTokenizer.from_pretrained(path, model_max_length=77).save_pretrained(path)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=dim, bos_token_id=len(pieces) - 2, pad_token_id=len(pieces) - 1,
        eos_token_id=2 if published_eos else len(pieces) - 1,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(path)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """Directory of a tiny random CLIP text encoder with features of 12 numbers. Read only."""
    path = tmp_path_factory.mktemp("tiny_clip")
    write_tiny_clip(path, 12)
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """Directory of a tiny plain CogVideoX pipeline (sincos positions, as the 2B). Read only."""
    from diffusers import CogVideoXPipeline

    path = tmp_path_factory.mktemp("tiny_base")
    CogVideoXPipeline(**make_tiny_components()).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_lora(tmp_path_factory, tiny_base) -> Path:
    """Directory of a LoRA for the tiny base as stage 1 writes it, rank 4 and alpha 2, all factors drawn. Read only."""
    from diffusers import CogVideoXPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from common.cogvideox.pipeline_io import load_component

    path = tmp_path_factory.mktemp("tiny_lora")
    transformer = load_component(tiny_base, "transformer")
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=2.0, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    layers, metadata = get_peft_model_state_dict(transformer), _collate_lora_metadata({"transformer": transformer})
    CogVideoXPipeline.save_lora_weights(path, transformer_lora_layers=layers, **metadata)
    return path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory, tiny_base) -> Path:
    """Holds stage2, stage3 and stage4: untrained models as those stages write them. Read only."""
    from common.cogvideox.control_adapter import ControlVocabulary
    from common.cogvideox.pipeline_io import load_component, write_pipeline
    from common.cogvideox.scheduler import CogVideoXSwinDPMScheduler, CogVideoXSwinLCMScheduler
    from common.cogvideox.transformer import CogVideoXControlTransformer3DModel

    root = tmp_path_factory.mktemp("tiny_models")
    transformer = CogVideoXControlTransformer3DModel.from_transformer(
        load_component(tiny_base, "transformer"), control_dim=12, control_start_layer=1, control_end_layer=2
    )
    parts = {"transformer": transformer, "control_vocabulary": ControlVocabulary.orthogonal(list(CONTROL_TOKENS), 12)}
    write_pipeline(root / "stage2", tiny_base, "CogVideoXControlPipeline", parts)
    config = load_component(tiny_base, "scheduler").config
    for name, scheduler in (("stage3", CogVideoXSwinDPMScheduler), ("stage4", CogVideoXSwinLCMScheduler)):
        parts["scheduler"] = scheduler.from_config(config)
        write_pipeline(root / name, tiny_base, "CogVideoXStreamingPipeline", parts)
    return root


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """Data root of four clips of 33 frames, 32×64 pixels, with labels and index.json. Read only."""
    path = tmp_path_factory.mktemp("tiny_world")
    from data.miniworld import make_videos

    words = "--num_clips 4 --num_frames 33 --height 32 --width 64 --num_workers 0 --output_dir"
    make_videos.make_videos(make_videos.parse_arguments([*words.split(), str(path)]))
    return path


@pytest.fixture
def run_program(monkeypatch, capsys):
    """Runs a program in this process, by its path from the root; returns what it said on stdout. It has to succeed."""

    def run(program: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [program, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        shown = capsys.readouterr()
        assert end.value.code == 0, shown.err
        return shown.out

    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a program (its main, or its path from the root) with bad input and returns the line that it ends with.

    It has to end with exit code 2, and to say nothing else but which clips it skipped and how far it had come.
    """

    def run(program: Callable[[], None] | str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            if isinstance(program, str):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                run_cli(program)
        shown = capsys.readouterr()
        quiet = re.compile(r".*(it/s|clip/s|\?it)\]|skipping index entry|$")
        lines = [line for line in shown.err.splitlines() if not quiet.match(line)]
        assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), shown.err
        return lines[0]

    return run


@pytest.fixture
def noting_python(tmp_path):
    """An interpreter for shell scripts that notes what it was started with and leaves.

    Its path, and a function → [(CUDA_VISIBLE_DEVICES, words)] of all its starts.
    """
    python, noted = tmp_path / "python", tmp_path / "noted.jsonl"
    note = "import json, os, sys; line = json.dumps([os.environ.get('CUDA_VISIBLE_DEVICES'), sys.argv[1:]]); "
    note += f"print(line, file=open({str(noted)!r}, 'a'))"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -c "{note}" "$@"\n')
    python.chmod(0o755)

    def starts() -> list[tuple[str | None, list[str]]]:
        lines = noted.read_text().splitlines() if noted.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    return python, starts
