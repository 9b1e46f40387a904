"""Fuses stage 1's LoRA into its base; see common/tools/fuse_lora_weights.py, or --help."""

from common.config.errors import run_cli
from common.tools.fuse_lora_weights import main

if __name__ == "__main__":
    run_cli(main)
