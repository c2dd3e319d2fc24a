"""CogView3-Plus, text to image: the second model on the same core, mixins, diffusion and engine as the video models."""
