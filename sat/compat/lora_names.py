"""How files of LoRA adapters name the two matrices of a module: SAT, diffusers and PEFT, kohya, ComfyUI."""

LORA_FUSED = "transformer.layers.{layer}.attention.query_key_value"
LORA_FUSED_PARTS = (
    "transformer_blocks.{layer}.attn1.to_q",
    "transformer_blocks.{layer}.attn1.to_k",
    "transformer_blocks.{layer}.attn1.to_v",
)
"""SAT's fused projection, and diffusers' modules for the blocks of its rows, in order."""

LORA_MODULES = (
    ("transformer.layers.{layer}.attention.dense", "transformer_blocks.{layer}.attn1.to_out.0"),
    ("transformer.layers.{layer}.mlp.dense_h_to_4h", "transformer_blocks.{layer}.ff.net.0.proj"),
    ("transformer.layers.{layer}.mlp.dense_4h_to_h", "transformer_blocks.{layer}.ff.net.2"),
)
"""Other modules that adapters may sit on: SAT's, diffusers'."""

LORA_TARGETS = (
    *LORA_FUSED_PARTS,
    *(theirs for _, theirs in LORA_MODULES),
    "transformer_blocks.{layer}.norm1.linear",
    "transformer_blocks.{layer}.norm2.linear",
    "patch_embed.proj",
    "patch_embed.text_proj",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "ofs_embedding.linear_1",
    "ofs_embedding.linear_2",
    "norm_out.linear",
    "proj_out",
)
"""Every module of diffusers' transformer that an adapter can sit on."""

LORA_ROOTS = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.")
"""What may stand before a module's dotted name."""

LORA_FLAT_ROOTS = ("lora_unet__", "lora_unet_")
"""What stands before a module's name with underscores in the place of dots (kohya, VideoX-Fun)."""

LORA_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
LORA_UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight")
LORA_ALPHA = (".alpha",)
"""Endings of the matrix that reduces to the rank, of that which expands from it, and of the number alpha."""

DIFFUSERS_METADATA = "lora_adapter_metadata"
"""The entry in a safetensors file's metadata in which diffusers and PEFT keep rank and alpha, as JSON."""
