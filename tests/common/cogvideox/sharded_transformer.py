"""What test_context_parallel.py starts: every process compares a shared transformer with one of its own.

sharded_transformer.py DEVICE [MODEL_PATH]: given a model, also with compiled blocks, its stream, and the benchmark.
"""

import functools
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from common.cogvideox.compilation import compile_blocks
from common.cogvideox.context_parallel import context_parallel_from_environment, num_processes, shard_over_processes
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.rotary import rotary_positional_embeddings
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.tools import benchmark

B, F, C, H, W, L, E_TEXT, E_CONTROL = 2, 3, 4, 10, 14, 7, 24, 12  # 35 tokens a frame, 7 of text: uneven by 2 and by 3
TINY = {
    "num_attention_heads": 5, "attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 16, "in_channels": C,
    "out_channels": C, "text_embed_dim": E_TEXT, "max_text_seq_length": L, "sample_height": H, "sample_width": W,
    "sample_frames": 9, "control_dim": E_CONTROL, "control_start_layer": 1, "control_end_layer": 2,
}  # fmt: skip
TOKEN_CAUSAL = {"control_attention": "token_causal"}
FRAME_CAUSAL = {"control_attention": "frame_causal", "control_temporal_position": True}
ROTARY = {"use_rotary_positional_embeddings": True}
EVEN = {"num_attention_heads": 6, "sample_width": 12, "max_text_seq_length": 6}  # 30 tokens a frame
CASES = {  # name → changes of the config, whether each frame has its timestep
    "sincos, one timestep": (TOKEN_CAUSAL, False),
    "sincos, per frame": (TOKEN_CAUSAL, True),
    "rotary, one timestep": ({**FRAME_CAUSAL, **ROTARY}, False),
    "rotary, per frame": ({**FRAME_CAUSAL, **ROTARY, "control_tokens_per_frame": 3}, True),
    "even heads, no control": ({"control_dim": None, "num_attention_heads": 6}, True),
    "all even": ({**FRAME_CAUSAL, **ROTARY, **EVEN}, True),
}


def make_model(changes: dict) -> CogVideoXControlTransformer3DModel:
    """Every parameter drawn, alike in all processes: zero-initialised parts must not hide a difference."""
    generator = torch.Generator().manual_seed(3)
    model = CogVideoXControlTransformer3DModel(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def inputs(config, per_frame: bool, device: torch.device) -> dict:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(B, F, C, config.sample_height, config.sample_width, generator=generator)
    control = None if config.control_dim is None else torch.randn(B, F, E_CONTROL, generator=generator)
    given = {
        "hidden_states": hidden_states,
        "encoder_hidden_states": torch.randn(B, config.max_text_seq_length, E_TEXT, generator=generator),
        "timestep": torch.tensor([[0, 400, 999], [0, 130, 700]] if per_frame else [999, 130]),
        "control_embeds": control,
    }
    given = {name: value if value is None else value.to(device) for name, value in given.items()}
    return {**given, "image_rotary_emb": rotary_positional_embeddings(config, hidden_states.shape, device)}


@torch.no_grad()
def compare(name: str, device: str, changes: dict, per_frame: bool, compiled: bool = False) -> None:
    model = make_model(changes).to(device)
    given = inputs(model.config, per_frame, model.device)
    expected = model(**given).sample
    shard_over_processes(model)
    if compiled:
        quicker = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # traced and checked as strictly
        with mock.patch.object(nn.Module, "compile", quicker):
            compile_blocks(model)
    output = model(**given).sample
    is_uneven = model._parallel_config.context_parallel_config.ulysses_anything
    assert is_uneven == (model.config.max_text_seq_length == L)
    tolerance = 1e-5 if device == "cpu" else 1e-4
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance, msg=lambda told: f"{name}: {told}")
    outputs = [torch.empty_like(output) for _ in range(num_processes())]
    dist.all_gather(outputs, output)
    assert all(torch.equal(output, other) for other in outputs), f"{name}: the processes drift apart"


def compare_streams(model_path: str, device: str) -> None:
    pipeline = CogVideoXStreamingPipeline.from_pretrained(model_path).to(device)

    def latents() -> list[torch.Tensor]:
        stream = pipeline.stream("x", "D", num_inference_steps=4, guidance_scale=3.0, seed=0)
        return [stream.advance() for _ in range(3)]

    expected = latents()
    shard_over_processes(pipeline.transformer)
    for shift, (one, other) in enumerate(zip(latents(), expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda told, shift=shift: f"{shift}: {told}")


def measure(model_path: str, device: str) -> None:
    """A stream of which the first process alone knows how long it will last."""
    sys.argv = ["benchmark", "--model_path", model_path, "--seconds", "0.01", "--warmup", "1", "--device", device]
    figures = benchmark.benchmark(benchmark.parse_arguments())
    assert (figures is None) == (dist.get_rank() > 0)
    if figures is not None:
        assert figures["processes"] == num_processes() and figures["chunks"] >= 2 and figures["median"]["vae"] > 0


def main(device: str, model_path: str | None = None) -> None:
    with context_parallel_from_environment(device):
        for name, case in CASES.items():
            compare(name, device, *case)
        if model_path is not None:
            compare("compiled", device, {**FRAME_CAUSAL, **ROTARY}, per_frame=True, compiled=True)
            compare_streams(model_path, device)
            measure(model_path, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
