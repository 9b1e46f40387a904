"""accelerate's Accelerator as the trainer wants it, whatever the environment says."""

from toy import toy_settings

from common.training.accelerator import build_accelerator


def test_gradients_are_not_divided_by_a_variable_of_the_environment(toy_data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert build_accelerator(toy_settings(toy_data, tmp_path)).gradient_accumulation_steps == 1
