"""FSDP2, which accelerate sets up from scripts/accelerate/fsdp2.yaml, made to compute what DDP computes.

Of itself accelerate would add up bf16 gradients in bf16, round every input to bf16 (rotary angles too), leave autocast
out, and refuse a class to wrap that a stage's model has none of.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor


def prepare_sharding(accelerator: Accelerator, module: nn.Module) -> None:
    """To be called before `accelerator.prepare(module)`: changes accelerate's plan and the module's forward."""
    plugin = accelerator.state.fsdp_plugin
    present = {type(part).__name__ for part in module.modules()}
    plugin.transformer_cls_names_to_wrap = [n for n in plugin.transformer_cls_names_to_wrap or [] if n in present]
    is_bf16 = accelerator.mixed_precision == "bf16"
    # Weights travel in bf16 where they are used so, gradients in float32.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if is_bf16:
        autocast = torch.autocast(accelerator.device.type, dtype=torch.bfloat16)
        module.forward = convert_outputs_to_fp32(autocast(module.forward))


def shard_frozen(accelerator: Accelerator, module: nn.Module) -> None:
    """Shards a model that no gradient trains (a teacher, an EMA) by the plan that `prepare_sharding` has made.

    `accelerator.prepare` takes one model. It would also leave what lies outside of the blocks gathered after a forward,
    for the backward; here none comes, and an EMA would go on with weights from before its update.
    """
    fsdp2_prepare_model(accelerator, module)
    module.set_reshard_after_forward(True)


def local_part(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor; of another one all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
