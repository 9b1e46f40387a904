"""One transformer over several processes by diffusers' context parallelism: every GPU holds all weights and a share of
the tokens, so that a frame is sooner ready.

The tokens *within* each latent frame are divided, and the text tokens, not the sequence as a whole: what is told to a
frame (its timestep, its control signals) then reaches its tokens in every process as it does in one. Self-attention
gathers all tokens for a share of the heads (DeepSpeed-Ulysses, arXiv 2309.14509); all else is done where a token lives.
Shares may be uneven, of tokens and of heads. Inference only: diffusers gives uneven shares no gradient.

    torchrun --nproc_per_node 2 stage4/inference.py …

Shapes: B batch, F latent frames, S tokens per latent frame, D model width, h heads, d = D/h, P processes; of process p:
Sₚ its tokens of a latent frame, Tₚ all its tokens, text and video.
"""

import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import diffusers
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
import transformers
from diffusers import ModelMixin
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import ContextParallelGatherHook, apply_context_parallel
from diffusers.models._modeling_parallel import (
    ContextParallelConfig,
    ContextParallelOutput,
    ParallelConfig,
    gather_size_by_comm,
)
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from common.config.errors import UserError

FIRST_SPEAKS_FIRST = 10.0  # seconds in which it says what is wrong, ends, and torchrun ends the others

_CONFIGS: dict[str, ParallelConfig] = {}  # by name of the process group, for compiled blocks


class Stream(Protocol):
    """What `in_lockstep` needs of a `VideoStream`."""

    shift: Callable[[], Tensor]


@contextmanager
def context_parallel_from_environment(device: str | None) -> Iterator[None]:
    """Within it the processes that torchrun started work together. Without torchrun, or with one, nothing is done.

    Args:
        device: --device, a kind; each process takes the GPU of its own number. None is a GPU if there is one.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    try:
        _meet(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        yield
    except UserError:
        if int(os.environ["RANK"]) > 0:
            time.sleep(FIRST_SPEAKS_FIRST)
        raise
    dist.barrier()  # not after an error: the others may wait for this process elsewhere, and torchrun ends them
    dist.destroy_process_group()


def _meet(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind == "cuda":
        count, num_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if number:
            raise UserError(f"--device {device}: torchrun gives each process a GPU of its own; say --device cuda")
        if count > num_gpus:
            raise UserError(f"--nproc_per_node {count}: each process needs a GPU, and there are {num_gpus} here")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if int(os.environ["RANK"]) > 0:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    # Sizes and messages go between CPUs even where tensors go between GPUs: the GPUs are then never waited for.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")


def num_processes() -> int:
    """How many processes share a transformer; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this process is the one that talks and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def in_lockstep(stream: Stream) -> Iterator[Stream | None]:
    """Every shift that the first process makes within it is made by all; → the stream in the first, or only, process.

    None in the others.

    The first takes the stream's chunks as it likes. It tells the others of every shift, and they make it too, with the
    same noise, signals and latents; what is within is theirs once the first has left it.
    """
    if num_processes() == 1:
        yield stream
        return
    shift = stream.shift
    if is_first_process():

        def shift_together() -> Tensor:
            _tell(True)
            return shift()

        stream.shift = shift_together
        yield stream
        _tell(False)
    else:
        while _tell(True):
            shift()
        yield None


def _tell(go_on: bool) -> bool:
    """What the first process says, in all of them."""
    said = torch.tensor([go_on], dtype=torch.uint8)
    dist.broadcast(said, src=0)
    return bool(said)


def refuse_taken_device(decode_device: str | None) -> None:
    """A `UserError` if what shall decode is the GPU of a process that shares the transformer, other than the first."""
    taken = range(1, int(os.environ["LOCAL_WORLD_SIZE"])) if num_processes() > 1 else ()
    if decode_device in [f"cuda:{number}" for number in taken]:
        raise UserError(f"decode_device {decode_device}: has a share of the transformer; give a GPU after those")


def shard_over_processes(transformer: ModelMixin) -> None:
    """From now on all processes have to call the transformer at the same time with the same inputs, and get its output.

    A `UserError` if the heads cannot be shared by so many, or if the transformer does not say where to divide tokens.
    """
    degree = num_processes()
    if degree == 1:
        return
    if getattr(transformer, "_cp_plan", None) is None:
        raise UserError(f"a {type(transformer).__name__} runs in one process; start it without torchrun")
    refuse_degree(transformer.config.num_attention_heads, degree)

    # What `enable_parallelism` does, which fails where no accelerator is.
    settings = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=True)
    config = ParallelConfig(context_parallel_config=settings)
    mesh = init_device_mesh(transformer.device.type, settings.mesh_shape, mesh_dim_names=settings.mesh_dim_names)
    config.setup(dist.get_rank(), degree, transformer.device, mesh=mesh)
    _CONFIGS[_group_name(config)] = transformer._parallel_config = config
    for processor in transformer.attn_processors.values():
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    divided = {name: plan for name, plan in transformer._cp_plan.items() if not isinstance(plan, ContextParallelOutput)}
    apply_context_parallel(transformer, settings, divided)
    for name, plan in transformer._cp_plan.items():
        if name not in divided:
            registry = HookRegistry.check_if_exists_or_initialize(transformer.get_submodule(name))
            registry.register_hook(GatherSharesHook([plan], settings), "gather_shares")
    choose = partial(_choose_ulysses, settings, inspect.signature(transformer.forward))
    transformer.register_forward_pre_hook(choose, with_kwargs=True)


def _choose_ulysses(
    settings: ContextParallelConfig, signature: inspect.Signature, transformer: ModelMixin, args: tuple, kwargs: dict
) -> None:
    """Plain Ulysses where all shares are even: for uneven ones diffusers has the processes tell one another their sizes
    four times a layer, and a GPU waits for that."""
    given = signature.bind(*args, **kwargs).arguments
    height, width = given["hidden_states"].shape[-2:]
    tokens_per_frame = (height // transformer.config.patch_size) * (width // transformer.config.patch_size)
    numbers = (tokens_per_frame, given["encoder_hidden_states"].shape[1], transformer.config.num_attention_heads)
    settings.ulysses_anything = any(number % settings.ulysses_degree for number in numbers)


def refuse_degree(num_heads: int, degree: int) -> None:
    """A `UserError` if diffusers cannot share the heads: each process takes ⌈h/P⌉, the last the rest, one at least."""
    possible = [n for n in range(1, num_heads + 1) if -num_heads % n < -(-num_heads // n)]
    if degree not in possible:
        near = [max(n for n in possible if n < degree), *[n for n in possible if n > degree][:1]]
        fitting = " or ".join(map(str, near))
        raise UserError(f"{num_heads} attention heads cannot be shared by {degree} processes; start {fitting}")


class GatherSharesHook(ContextParallelGatherHook):
    """diffusers' hook, which leaves uneven shares to the backend: gloo refuses them, NCCL sends them one by one."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """[B,F,Sₚ,·] → [B,F,S,·]."""
        if not self.parallel_config.ulysses_anything:
            return super().post_forward(module, output)
        dim = self.metadata[0].gather_dim
        shares = gather_size_by_comm(output.shape[dim], self.parallel_config._flattened_mesh.get_group())
        missing = max(shares) - output.shape[dim]
        padded = nnf.pad(output, (0, 0) * (output.ndim - 1 - dim) + (0, missing))
        pieces = super().post_forward(module, padded).chunk(len(shares), dim=dim)
        return torch.cat([piece.narrow(dim, 0, share) for piece, share in zip(pieces, shares, strict=True)], dim=dim)


def _group_name(config: ParallelConfig) -> str:
    return config.context_parallel_config._ulysses_mesh.get_group().group_name


def compiled_attention(
    query: Tensor, key: Tensor, value: Tensor, config: ParallelConfig, backend: Any = None
) -> Tensor:
    """`dispatch_attention_fn` with a parallel config, where it is compiled: [B,Tₚ,h,d] each → [B,Tₚ,h,d].

    The processes ask one another for the sizes of their shares, which torch.compile cannot trace. It sees one operator.
    """
    return _attention_operator(query, key, value, _group_name(config), backend)


@torch.library.custom_op("interactive_worlds::context_parallel_attention", mutates_args=())
def _attention_operator(query: Tensor, key: Tensor, value: Tensor, group: str, backend: str | None) -> Tensor:
    return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=_CONFIGS[group])


@_attention_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, group: str, backend: str | None) -> Tensor:
    return query.new_empty(query.shape)
