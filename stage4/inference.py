"""Stage 4: streams video with one forward per window shift; its length costs no memory.

python stage4/inference.py --model_path outputs/stage4 --prompt "…" --control "D*160,DL*160" --output drive.mp4
python stage4/inference.py --model_path outputs/stage4 --prompt "…" --init_video start.mp4 --seconds 60
torchrun --nproc_per_node 2 stage4/inference.py --model_path outputs/stage4 …   # one stream on two GPUs
"""

from common.config.errors import run_cli
from common.tools.inference import OUT_OF_MEMORY_HELP, stream

if __name__ == "__main__":
    run_cli(lambda: stream(__doc__), OUT_OF_MEMORY_HELP)
