"""Gathering and placing sharded state (FSDP2), with one process and no GPU, against an unsharded twin."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, DynamoBackend
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from common.cogvideox.rotary import rotary_positional_embeddings
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.config.errors import UserError
from common.config.settings import TrainingSettings
from common.training import optimizers
from common.training.checkpoints import module_state
from common.training.ema import update_ema
from common.training.export import make_skeleton
from common.training.low_precision_adamw import LowPrecisionAdamW
from common.training.sharding import prepare_sharding
from common.training.state import TrainingState, check_layout

ROOT = Path(__file__).parents[3]


def step(module, optimizer):
    torch.manual_seed(1)
    module(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_sharded_module_is_saved_and_restored_like_its_twin(one_process_group):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3))
    sharded, fresh, average = (copy.deepcopy(whole) for _ in range(3))
    skeleton = make_skeleton(sharded)
    assert all(p.is_meta for p in skeleton.parameters())
    before = copy.deepcopy(average.state_dict())
    for module in (sharded, fresh, average):
        fully_shard(module)
    adam = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (whole, sharded, fresh)]
    for _ in range(2):
        step(whole, adam[0])
        step(sharded, adam[1])
    assert isinstance(next(sharded.parameters()), DTensor)

    weights = optimizers.gather_tensors(module_state(sharded), keep=True)
    moments = optimizers.gather_tensors(
        optimizers.optimizer_state(adam[1], optimizers.trained_parameters(sharded)), keep=True
    )
    expected = optimizers.optimizer_state(adam[0], optimizers.trained_parameters(whole))
    assert moments.keys() == expected.keys() and len(moments) == 3 * 4
    for got, wanted in ((weights, whole.state_dict()), (moments, expected)):
        for key, value in got.items():
            torch.testing.assert_close(value, wanted[key])
    assert optimizers.gather_tensors(module_state(sharded), keep=False) == {}

    # A new sharded module takes them over and goes on as the twin does.
    for name, parameter in fresh.named_parameters():
        parameter.data.copy_(optimizers.like_parameter(weights[name], parameter))
    optimizers.load_optimizer_state(adam[2], optimizers.trained_parameters(fresh), moments)
    step(whole, adam[0])
    step(fresh, adam[2])
    after = optimizers.gather_tensors(module_state(fresh), keep=True)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(after[key], value)

    skeleton.load_state_dict(after, assign=True)
    torch.testing.assert_close(skeleton(torch.ones(1, 4)), whole(torch.ones(1, 4)))
    update_ema(average, fresh, 0.75)
    for key, value in optimizers.gather_tensors(module_state(average), keep=True).items():
        torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * after[key])


def small_transformer(control_dim):
    torch.manual_seed(0)
    return CogVideoXControlTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, time_embed_dim=16, text_embed_dim=8,
        max_text_seq_length=4, sample_height=4, sample_width=4, sample_frames=9, use_rotary_positional_embeddings=True,
        control_dim=control_dim, control_start_layer=0, control_end_layer=2, control_zero_init=False,
    )  # fmt: skip


@pytest.mark.parametrize("control_dim", [12, None])
def test_sharded_bf16_model_computes_what_autocast_computes_and_adds_gradients_in_float32(
    one_process_group, monkeypatch, control_dim
):
    accelerate_config = yaml.safe_load((ROOT / "scripts" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", accelerate_config["fsdp_transformer_layer_cls_to_wrap"])
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(  # accelerate's own knows no FSDP on a CPU
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", device=torch.device("cpu"),
        is_main_process=False,
    )  # fmt: skip
    whole = small_transformer(control_dim)
    sharded = copy.deepcopy(whole)
    prepare_sharding(accelerator, sharded)
    fsdp2_prepare_model(accelerator, sharded)
    units = [type(m).__name__ for m in sharded.modules() if isinstance(m, FSDPModule)]
    assert sum("CogVideoXBlock" in name for name in units) == 2
    assert sum("ControlBlock" in name for name in units) == (2 if control_dim else 0)
    policies = {m._get_fsdp_state()._mp_policy for m in sharded.modules() if isinstance(m, FSDPModule)}
    assert [(p.param_dtype, p.reduce_dtype, p.output_dtype, p.cast_forward_inputs) for p in policies] == [
        (torch.bfloat16, torch.float32, None, False)
    ]

    latents = torch.randn(2, 3, 16, 4, 4)
    call = {
        "hidden_states": latents.bfloat16(), "encoder_hidden_states": torch.randn(2, 4, 8).bfloat16(),
        "timestep": torch.tensor([100, 900]), "control_embeds": torch.randn(2, 3, control_dim) if control_dim else None,
        "image_rotary_emb": rotary_positional_embeddings(whole.config, latents.shape, latents.device),
        "return_dict": False,
    }  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = whole(**call)[0].float()
    output = sharded(**call)[0]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=0, rtol=0)
    for result in (expected, output):
        result.square().mean().backward()
    got = torch.cat([p.grad.full_tensor().flatten() for p in sharded.parameters()])
    wanted = torch.cat([p.grad.flatten() for p in whole.parameters()])
    assert got.dtype == torch.float32 and (got - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize(
    ("changes", "processes", "kind", "message"),
    [
        ({"optimizer": "muon"}, 2, "FSDP", "optimizer: muon needs whole matrices"),
        ({"trained_weights": "bfloat16"}, 2, "FSDP", "trained_weights: .* 'float32'"),
        ({"step_in_backward": True}, 1, "FSDP", "step_in_backward: is for one process without"),
        ({"step_in_backward": True}, 1, "MULTI_GPU", "step_in_backward: is for one process without"),
        ({"cuda_graph": True}, 2, "MULTI_GPU", "cuda_graph: is for one process, here are 2"),
    ],
)
def test_what_the_processes_cannot_do_is_refused_before_anything_is_loaded(changes, processes, kind, message):
    settings = TrainingSettings(**changes)
    with pytest.raises(UserError, match=message):
        TrainingState(settings, None, layout(processes, kind, is_fsdp2=kind == "FSDP"), None)
    check_layout(settings, layout(1, "NO"))


def layout(processes, kind, is_fsdp2=False, backend=DynamoBackend.NO):
    """What `check_layout` asks an Accelerator."""
    plugin = SimpleNamespace(backend=backend)
    return SimpleNamespace(
        num_processes=processes, distributed_type=DistributedType(kind), is_fsdp2=is_fsdp2,
        state=SimpleNamespace(dynamo_plugin=plugin),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_layout_whose_shards_would_be_taken_for_whole_weights_is_refused(kind):
    """FSDP without fsdp_version in a config of the user's is FSDP1, whose checkpoints would hold one process's part."""
    with pytest.raises(UserError, match=f"ACCELERATE_CONFIG_FILE: {kind} .*fsdp_version: 2.*fsdp2.yaml"):
        check_layout(TrainingSettings(), layout(2, kind))


def test_compiling_by_accelerates_config_is_refused_where_names_would_change():
    with pytest.raises(UserError, match="ACCELERATE_CONFIG_FILE: its dynamo_config .INDUCTOR.*setting compile"):
        check_layout(TrainingSettings(), layout(1, "NO", backend=DynamoBackend.INDUCTOR))


@pytest.mark.parametrize("shape", [(0, 7), (0,)])
def test_a_process_that_holds_no_row_of_a_weight_steps_with_the_others(shape):
    """As FSDP2 leaves it of a weight with fewer rows than there are processes: a LoRA of rank 4 on 8 GPUs."""
    empty = nn.Parameter(torch.zeros(shape))
    empty.grad = torch.zeros(shape)
    optimizer = LowPrecisionAdamW([empty], 1e-3, (0.9, 0.95), 1e-8, 0.0)
    optimizer.step()
    assert optimizer.state[empty]["step"] == 1
