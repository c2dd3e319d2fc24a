"""Train a video model: python train_video.py --base MODEL.yaml RUN.yaml [--seed 42] [section.key=value ...]

Starts alike as `python`, `torchrun --nproc_per_node N` and `deepspeed`.
"""

from sat.training.cli import main

if __name__ == "__main__":
    main()
