"""SAT: train and sample CogVideoX-class video diffusion transformers.

Importing this package starts no process group, imports no DeepSpeed, touches no GPU and prints nothing.
"""

__version__ = "0.1.0"
