"""Stage 3: streams video from a sliding window; its length costs no memory.

python stage3/inference.py --model_path outputs/stage3 --prompt "…" --control "D*160,DL*160" --output drive.mp4
python stage3/inference.py --model_path outputs/stage3 --prompt "…" --control "D*1" --seconds 600 --output drive.mp4
torchrun --nproc_per_node 2 stage3/inference.py --model_path outputs/stage3 …   # one stream on two GPUs
"""

from common.config.errors import run_cli
from common.tools.inference import OUT_OF_MEMORY_HELP, stream

if __name__ == "__main__":
    run_cli(lambda: stream(__doc__), OUT_OF_MEMORY_HELP)
