"""From prompts and images to the tensors that condition the video model."""
