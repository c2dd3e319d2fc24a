"""Sample videos: python sample_video.py --load RUN_DIRECTORY --prompt "..." [--seed 42] [section.key=value ...]

Starts alike as `python`, `torchrun --nproc_per_node N` and `deepspeed`.
"""

from sat.sampling.cli import main

if __name__ == "__main__":
    main()
