"""The patched transformer against diffusers' class, the published layout's reference outputs, and closed forms."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors import safe_open

from common.cogvideox.attention import control_attention_bias
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel

REFERENCE = Path(__file__).parents[2] / "fixtures" / "reference_2b_layout.safetensors"
B, F, C, H, W, L, E_TEXT, E_CONTROL = 2, 5, 16, 4, 6, 8, 24, 12
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "time_embed_dim": 16,
    "text_embed_dim": E_TEXT, "max_text_seq_length": L, "sample_height": H, "sample_width": W, "sample_frames": 17,
}  # fmt: skip
CONTROL = {"control_dim": E_CONTROL, "control_start_layer": 2, "control_end_layer": 4}
FRAME_CAUSAL = {"control_attention": "frame_causal", "control_temporal_position": True}


def inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(B, F, C, H, W, generator=g, dtype=torch.float64).to(dtype),
        "encoder_hidden_states": torch.randn(B, L, E_TEXT, generator=g, dtype=torch.float64).to(dtype),
        "timestep": torch.tensor([999, 130]),
    }


def control_rows(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, F, E_CONTROL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomise(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Every parameter drawn: zero-initialised parts must not hide a difference."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def rotary():
    cos, sin = get_3d_rotary_pos_embed(16, ((0, 0), (H // 2, W // 2)), (H // 2, W // 2), F)
    return cos, sin


@pytest.mark.parametrize("use_rotary", [False, True], ids=["2b-sincos", "5b-rotary"])
def test_idle_patches_equal_diffusers_bit_for_bit_gradients_too(use_rotary):
    config = {**TINY, "use_rotary_positional_embeddings": use_rotary}
    theirs = randomise(CogVideoXTransformer3DModel(**config))
    ours = CogVideoXControlTransformer3DModel(**config)
    ours.load_state_dict(theirs.state_dict())  # strict: the same keys
    extra = {"image_rotary_emb": rotary()} if use_rotary else {}
    results = []
    for model in (theirs, ours):
        out = model(**inputs(), **extra).sample
        out.square().mean().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_equal_timesteps_per_frame_equal_one_timestep():
    model = randomise(CogVideoXControlTransformer3DModel(**TINY, **CONTROL)).double()
    one = inputs(dtype=torch.float64)
    per_frame = {**one, "timestep": one["timestep"][:, None].expand(B, F)}
    rows = control_rows(dtype=torch.float64)
    torch.testing.assert_close(
        model(**one, control_embeds=rows).sample, model(**per_frame, control_embeds=rows).sample, rtol=0, atol=1e-9
    )


def test_a_frames_timestep_reaches_its_own_modulation():
    """With attention cut off, changing frame 2's timestep changes frame 2 alone, the last frame's also the text."""
    model = randomise(CogVideoXControlTransformer3DModel(**TINY))
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.to_out[0].weight.zero_()
    timestep = torch.tensor([[0, 250, 500, 750, 999]]).expand(B, F).clone()
    before = model(**{**inputs(), "timestep": timestep}).sample
    timestep[:, 2] = 3
    after = model(**{**inputs(), "timestep": timestep}).sample
    changed = (before != after).flatten(2).any(dim=2).any(dim=0)
    assert changed.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("form", ["token_causal", "frame_causal"])
def test_new_adapter_changes_nothing_until_its_gate_opens(form):
    base = randomise(CogVideoXTransformer3DModel(**TINY))
    model = CogVideoXControlTransformer3DModel.from_transformer(
        base, **CONTROL, control_attention=form, control_temporal_position=form == "frame_causal"
    )
    expected = base(**inputs()).sample
    assert torch.equal(model(**inputs(), control_embeds=control_rows()).sample, expected)
    with torch.no_grad():
        dim = 32
        for block in model.control_blocks:
            block.norm1.linear.bias[2 * dim : 3 * dim].fill_(0.5)
    assert not torch.allclose(model(**inputs(), control_embeds=control_rows()).sample, expected, atol=1e-4)
    assert torch.equal(model(**inputs()).sample, expected)  # no signal: the model as it was


@pytest.mark.parametrize("form", ["token_causal", "frame_causal"])
def test_few_keys_equal_repeated_keys_in_float64(form):
    """softmax over F keys with log-count bias = softmax over F·S repeated keys under a plain mask."""
    S, heads, d = 6, 2, 8
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, heads, F * S, d, generator=g, dtype=torch.float64)
    k, v = (torch.randn(B, heads, F, d, generator=g, dtype=torch.float64) for _ in range(2))
    bias = control_attention_bias(F, S, form, dtype=torch.float64)
    few = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    rows = torch.arange(F * S)
    mask = rows[:, None] >= rows[None, :] if form == "token_causal" else rows[:, None] // S >= rows[None, :] // S
    repeated = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(S, dim=2), v.repeat_interleave(S, dim=2), attn_mask=mask
    )
    torch.testing.assert_close(few, repeated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["token_causal", "frame_causal"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_control_is_causal(form, num_tokens):
    """A later signal never reaches the control blocks of earlier frames (attention between frames cut off)."""
    more = {"control_attention": form, "control_tokens_per_frame": num_tokens}
    model = randomise(CogVideoXControlTransformer3DModel(**TINY, **CONTROL, **more))
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.to_out[0].weight.zero_()
    rows = control_rows()
    before = model(**inputs(), control_embeds=rows).sample
    rows[:, 3] += 1.0
    after = model(**inputs(), control_embeds=rows).sample
    changed = (before != after).flatten(2).any(dim=2).any(dim=0)
    assert changed.tolist() == [False, False, False, True, True]


def test_temporal_position_makes_the_order_of_commands_matter():
    """Keys without positions are a bag: the last frame cannot tell which of two earlier commands came first."""
    rows = control_rows()
    swapped = rows[:, [1, 0, 2, 3, 4]]
    for positions, differs in ((False, False), (True, True)):
        model = CogVideoXControlTransformer3DModel(
            **TINY, **CONTROL, control_attention="frame_causal", control_temporal_position=positions
        )
        model = randomise(model).double()
        with torch.no_grad():
            for block in model.transformer_blocks:
                block.attn1.to_out[0].weight.zero_()
        last = [model(**inputs(dtype=torch.float64), control_embeds=r.double()).sample[:, -1] for r in (rows, swapped)]
        assert torch.allclose(*last, atol=1e-9) != differs


def test_several_equal_control_tokens_are_as_one():
    """In a softmax K copies of every key weigh as the keys do: the form with one token is the special case."""
    one = randomise(CogVideoXControlTransformer3DModel(**TINY, **CONTROL, **FRAME_CAUSAL)).double()
    many = CogVideoXControlTransformer3DModel(**TINY, **CONTROL, **FRAME_CAUSAL, control_tokens_per_frame=3).double()
    weights = one.state_dict()
    for name in ("control_embedding.4.weight", "control_embedding.4.bias"):
        weights[name] = torch.cat([weights[name]] * 3)
    many.load_state_dict(weights)
    given = {**inputs(dtype=torch.float64), "control_embeds": control_rows().double()}
    torch.testing.assert_close(many(**given).sample, one(**given).sample, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_tokens", "differs"), [(1, False), (3, True)])
def test_several_control_tokens_let_a_held_signal_differ_over_the_picture(num_tokens, differs):
    """Of one token a frame all attention can make is one vector, where every frame has the same signal."""
    more = {**FRAME_CAUSAL, "control_tokens_per_frame": num_tokens}
    model = randomise(CogVideoXControlTransformer3DModel(**TINY, **CONTROL, **more)).double()
    attended = []
    model.control_blocks[0].attn1.register_forward_hook(lambda module, given, output: attended.append(output))
    held = control_rows().double()[:, :1].expand(-1, F, -1)
    model(**inputs(dtype=torch.float64), control_embeds=held)
    spread = attended[0].std(dim=1).max()  # over the tokens [B,F·S,D]
    assert (spread > 1e-3) == differs and (differs or spread < 1e-12)


@pytest.mark.parametrize("per_frame", [True, False], ids=["per_frame_timestep", "scalar_timestep"])
def test_published_layout_matches_reference_outputs(per_frame):
    with safe_open(REFERENCE, "pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no dict)
        config = json.loads(f.metadata()["config"])
    model = CogVideoXControlTransformer3DModel(**config)
    weights = {key[len("weights.") :]: value for key, value in tensors.items() if key.startswith("weights.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"patch_embed.pos_embedding"}
    timestep = tensors["inputs.timestep"]
    out = model(
        tensors["inputs.hidden_states"],
        tensors["inputs.encoder_hidden_states"],
        timestep if per_frame else timestep[:, -1],
        control_embeds=tensors["inputs.control_embeds"],
    ).sample
    expected = tensors["outputs.per_frame_timestep" if per_frame else "outputs.scalar_timestep"]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_2b_has_the_published_number_of_tensors_and_parameters():
    with torch.device("meta"):
        model = CogVideoXControlTransformer3DModel(control_dim=768)
    state = model.state_dict()
    assert len(state) == 982
    assert sum(t.numel() for t in state.values()) == pytest.approx(2.0095e9, rel=1e-4)
    assert sum(p.numel() for p in model.control_parameters()) == pytest.approx(315.8e6, rel=1e-3)
    assert state["control_blocks.14.norm1.linear.weight"].shape == (11520, 512)


def test_a_model_made_of_a_bfloat16_base_is_made_in_bfloat16(monkeypatch):
    """Parameters are born so: one in float32, even for a moment, takes twice the memory. Positions stay exact."""
    born, register = set(), torch.nn.Module.register_parameter

    def note(self, name, parameter):
        born.update({parameter.dtype} if parameter is not None else ())
        register(self, name, parameter)

    base = CogVideoXTransformer3DModel(**TINY)
    positions = base.patch_embed.pos_embedding.bfloat16()
    monkeypatch.setattr(torch.nn.Module, "register_parameter", note)
    model = CogVideoXControlTransformer3DModel.from_transformer(torch.nn.Module.to(base, torch.bfloat16), **CONTROL)
    assert born == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    assert torch.equal(model.patch_embed.pos_embedding, positions)


def test_guidance_embedding_starts_neutral_and_then_matters():
    base = randomise(CogVideoXTransformer3DModel(**TINY))
    model = CogVideoXControlTransformer3DModel.from_transformer(base, cond_proj_dim=8)
    cond = torch.ones(B, 8)
    expected = base(**inputs()).sample
    assert torch.equal(model(**inputs(), timestep_cond=cond).sample, expected)
    torch.nn.init.ones_(model.time_embedding.cond_proj.weight)
    assert not torch.allclose(model(**inputs(), timestep_cond=cond).sample, expected)
    per_frame = inputs()["timestep"][:, None].expand(B, F)
    torch.testing.assert_close(
        model(**{**inputs(), "timestep": per_frame}, timestep_cond=cond).sample,
        model(**inputs(), timestep_cond=cond).sample,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = randomise(CogVideoXControlTransformer3DModel(**TINY, **CONTROL)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs(), control_embeds=control_rows()).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_attention_backend_reaches_self_attention():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    model = CogVideoXControlTransformer3DModel(**TINY, **CONTROL)
    before = registry.get_active_backend()[0]
    model.set_attention_backend("flex")
    try:
        backends = {type(p).__name__: getattr(p, "_attention_backend", None) for p in model.attn_processors.values()}
        assert backends["CogVideoXDispatchAttnProcessor"].value == "flex"
    finally:
        registry.set_active_backend(before)  # diffusers sets it for the whole process and never takes it back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size_t": 2}, "1.5"),
        ({"control_dim": 4, "control_start_layer": 3, "control_end_layer": 9}, "control layers"),
        ({**CONTROL, "control_tokens_per_frame": 0}, "1 or more, got 0"),
        ({"control_dim": 4, "control_end_layer": 4, "control_start_layer": 0, "control_attention": "x"}, "token_c"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        model = CogVideoXControlTransformer3DModel(**{**TINY, **change})
        model(**inputs(), control_embeds=torch.zeros(B, F, 4))
