"""Weights from one layout to another: SAT's, diffusers' and ComfyUI's, with a check at the end."""
