"""The CogVideoX models, assembled from the core, the diffusion mathematics and the mixins of this package."""
