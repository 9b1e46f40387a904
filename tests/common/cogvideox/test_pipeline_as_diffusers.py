"""What a user of diffusers expects of the pipeline of whole clips, with real (tiny, untrained) models."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from peft import LoraConfig

from common.cogvideox.guidance import dynamic_guidance_scale
from common.cogvideox.pipeline_cogvideox import CogVideoXControlPipeline, CogVideoXStreamingPipeline
from common.cogvideox.scheduler import CogVideoXSwinDPMScheduler, CogVideoXSwinLCMScheduler
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.config.errors import UserError
from tests.common.cogvideox.tiny_pipelines import NAMES, PROMPT, SIZE, controlled, generator
from tests.conftest import make_tiny_components


@pytest.fixture(scope="module")
def base():
    return make_tiny_components()


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("scheduler", [CogVideoXDPMScheduler, CogVideoXSwinDPMScheduler, CogVideoXDDIMScheduler])
@pytest.mark.parametrize("rotary", [False, True])
def test_without_control_it_makes_what_diffusers_makes(rotary, scheduler, guidance_scale):
    parts = make_tiny_components(rotary=rotary)
    parts["scheduler"] = scheduler.from_config(parts["scheduler"].config)
    theirs = CogVideoXPipeline(**parts)
    transformer = CogVideoXControlTransformer3DModel.from_transformer(parts["transformer"]).eval()
    ours = CogVideoXControlPipeline(**{**parts, "transformer": transformer})
    clips = []
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
        clips.append(
            pipe(
                PROMPT, num_frames=9, num_inference_steps=4, guidance_scale=guidance_scale, generator=generator(),
                output_type="np", max_sequence_length=16, **SIZE,
            ).frames
        )  # fmt: skip
    assert np.array_equal(*clips) and clips[0].shape == (1, 9, 32, 48, 3) and clips[0].std() > 0


def test_several_videos_of_a_prompt_are_made_and_share_its_signal(base):
    """What diffusers takes `num_videos_per_prompt` for, but sets back to 1."""
    common = {"num_frames": 9, "num_inference_steps": 2, "output_type": "latent", "eta": 0.0}
    plain = {**base, "transformer": CogVideoXControlTransformer3DModel.from_transformer(base["transformer"]).eval()}
    theirs, ours = CogVideoXPipeline(**base), CogVideoXControlPipeline(**plain)
    clips = []
    for pipe, prompts, number in ((theirs, [PROMPT] * 2 + ["snow"] * 2, 1), (ours, [PROMPT, "snow"], 2)):
        pipe.set_progress_bar_config(disable=True)
        arguments = {**common, **SIZE, "max_sequence_length": 16, "num_videos_per_prompt": number}
        clips.append(pipe(prompts, generator=generator(), **arguments).frames)
    assert torch.equal(*clips) and len(clips[0]) == 4
    common["num_videos_per_prompt"] = 2
    pipe = CogVideoXControlPipeline(**controlled(base, base["scheduler"]))
    pipe.set_progress_bar_config(disable=True)
    each, shared = (
        pipe([PROMPT, "snow"], control_signal=signals, generator=generator(), **common, **SIZE).frames
        for signals in ([[0, 1, 3]] * 2 + [[6, 6, 6]] * 2, [[0, 1, 3], [6, 6, 6]])
    )
    assert torch.equal(each, shared)
    embeds = pipe.encode_prompt(PROMPT, max_sequence_length=16)
    with pytest.raises(UserError, match="num_videos_per_prompt goes with prompts"):
        pipe(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], **common, **SIZE)


def test_fused_projections_and_other_processors_leave_control_attention_alone(base):
    pipe = CogVideoXControlPipeline(**controlled(base, base["scheduler"]))
    pipe.set_progress_bar_config(disable=True)

    def clip():
        arguments = {"num_frames": 9, "num_inference_steps": 2, "output_type": "latent", "control_signal": "DL"}
        return pipe(PROMPT, generator=generator(), **arguments, **SIZE).frames

    before = clip()
    pipe.fuse_qkv_projections()
    torch.testing.assert_close(clip(), before, rtol=0, atol=1e-5)
    pipe.unfuse_qkv_projections()
    pipe.transformer.set_attn_processor(CogVideoXAttnProcessor2_0())
    torch.testing.assert_close(clip(), before, rtol=0, atol=1e-5)


def test_a_distilled_model_makes_clips_as_it_was_distilled(base):
    pipe = CogVideoXStreamingPipeline(**controlled(base, CogVideoXSwinLCMScheduler(frames_per_group=1)))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPT, num_frames=17, output_type="np", **SIZE).frames.shape == (1, 17, 32, 48, 3)
    assert pipe.num_timesteps == 4
    with pytest.raises(UserError, match="use_dynamic_cfg"):
        pipe(PROMPT, num_frames=17, use_dynamic_cfg=True, **SIZE)


@pytest.mark.parametrize("use_dynamic_cfg", [False, True])
def test_a_callback_sees_and_stops_what_diffusers_lets_it(base, use_dynamic_cfg):
    parts = {**base, "transformer": CogVideoXControlTransformer3DModel.from_transformer(base["transformer"]).eval()}
    seen, clips = {}, []

    def callback(pipe, step, timestep, tensors):
        assert pipe.current_timestep is timestep and pipe.attention_kwargs == {}
        told = (step, timestep.item(), pipe.num_timesteps, pipe.interrupt)
        seen.setdefault(type(pipe), []).append((*told, pipe.guidance_scale))
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"] * 2}

    for pipe in (CogVideoXPipeline(**base), CogVideoXControlPipeline(**parts)):
        pipe.set_progress_bar_config(disable=True)
        for _ in range(2):  # an interruption ends with its call
            clip = pipe(
                PROMPT, num_frames=9, num_inference_steps=4, guidance_scale=6.0, generator=generator(),
                output_type="latent", max_sequence_length=16, attention_kwargs={}, callback_on_step_end=callback,
                use_dynamic_cfg=use_dynamic_cfg, **SIZE,
            ).frames  # fmt: skip
        clips.append(clip)
        assert pipe.current_timestep is None
    theirs, ours = seen.values()
    assert [told[0] for told in ours] == [0, 1] * 2
    if use_dynamic_cfg:  # by the step's number, where diffusers takes the timestep's
        scales = [dynamic_guidance_scale(6.0, step, 4) for step in (0, 1)]
        assert [told[-1] for told in ours] == scales * 2
    else:
        assert ours == theirs and torch.equal(*clips)


def test_a_pipeline_with_a_lora_attached_is_not_saved(base, tmp_path):
    pipe = CogVideoXControlPipeline(**controlled(base, base["scheduler"]))
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="fuse_lora.*unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "made")
    assert CogVideoXControlPipeline.from_pretrained(tmp_path / "made").control_vocabulary.names == NAMES
