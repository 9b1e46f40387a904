"""Which run of a tracker a log goes to."""

from types import SimpleNamespace

from common.training.metrics import RunLog


def wandb_arguments(output_dir, start_step: int) -> dict[str, str]:
    """What `wandb.init` is called with, which is not installed here."""
    given = []
    accelerator = SimpleNamespace(
        is_main_process=True, init_trackers=lambda name, init_kwargs: given.append(init_kwargs["wandb"])
    )
    RunLog(output_dir, start_step, "wandb", accelerator)
    return given[0]


def test_resumed_run_goes_on_with_its_wandb_run_and_no_other_does(tmp_path):
    first = wandb_arguments(tmp_path / "run", 0)
    assert first["name"] == "run" and first["resume"] == "allow" and first["id"].isalnum()
    assert wandb_arguments(tmp_path / "run", 500) == first
    (tmp_path / "run").rename(tmp_path / "moved")
    assert wandb_arguments(tmp_path / "moved", 500)["id"] == first["id"]
    anew = wandb_arguments(tmp_path / "moved", 0)  # whose steps wandb would refuse in the run that went beyond
    elsewhere = wandb_arguments(tmp_path / "run", 500)  # from another run's checkpoint
    assert len({run["id"] for run in (first, anew, elsewhere)}) == 3
