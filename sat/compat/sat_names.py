"""Names in released CogVideoX configuration files, and what answers to them here."""

TARGETS = {
    # the video model
    "dit_video_concat.DiffusionTransformer": "sat.cogvideox.transformer.DiffusionTransformer",
    "dit_video_concat.ImagePatchEmbeddingMixin": "sat.cogvideox.mixins.ImagePatchEmbeddingMixin",
    "dit_video_concat.Basic3DPositionEmbeddingMixin": "sat.cogvideox.mixins.Basic3DPositionEmbeddingMixin",
    "dit_video_concat.Rotary3DPositionEmbeddingMixin": "sat.cogvideox.mixins.Rotary3DPositionEmbeddingMixin",
    "dit_video_concat.AdaLNMixin": "sat.cogvideox.mixins.AdaLNMixin",
    "dit_video_concat.SwiGLUMixin": "sat.cogvideox.mixins.SwiGLUMixin",
    "dit_video_concat.FinalLayerMixin": "sat.cogvideox.mixins.FinalLayerMixin",
    "diffusion_video.SATVideoDiffusionEngine": "sat.cogvideox.engine.VideoDiffusionEngine",
    # the image model
    "sgm.modules.diffusionmodules.dit.DiffusionTransformer": "sat.cogview3.transformer.CogView3PlusTransformer",
    "sgm.modules.diffusionmodules.dit.ImagePatchEmbeddingMixin": "sat.cogvideox.mixins.ImagePatchEmbeddingMixin",
    "sgm.modules.diffusionmodules.dit.PositionEmbeddingMixin": "sat.cogview3.mixins.PositionEmbeddingMixin",
    "sgm.modules.diffusionmodules.dit.AdalnAttentionMixin": "sat.cogview3.mixins.AdalnAttentionMixin",
    "sgm.modules.diffusionmodules.dit.FinalLayerMixin": "sat.cogview3.mixins.CogView3FinalLayerMixin",
    # diffusion
    "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser": "sat.diffusion.scaling.DiscreteDenoiser",
    "sgm.modules.diffusionmodules.denoiser_scaling.VideoScaling": "sat.diffusion.scaling.VideoScaling",
    "sgm.modules.diffusionmodules.denoiser_scaling.ZeroSNRScaling": "sat.diffusion.scaling.VideoScaling",
    "sgm.modules.diffusionmodules.denoiser_weighting.EpsWeighting": "sat.diffusion.scaling.EpsWeighting",
    "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization": (
        "sat.diffusion.schedules.ZeroSNRDDPMDiscretization"
    ),
    "sgm.modules.diffusionmodules.sigma_sampling.DiscreteSampling": "sat.diffusion.schedules.DiscreteSampling",
    "sgm.modules.diffusionmodules.loss.VideoDiffusionLoss": "sat.diffusion.loss.VideoDiffusionLoss",
    "sgm.modules.diffusionmodules.guiders.VanillaCFG": "sat.diffusion.guidance.VanillaCFG",
    "sgm.modules.diffusionmodules.guiders.IdentityGuider": "sat.diffusion.guidance.IdentityGuider",
    "sgm.modules.diffusionmodules.guiders.DynamicCFG": "sat.diffusion.guidance.DynamicCFG",
    "sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler": "sat.diffusion.samplers.VPSDEDPMPP2MSampler",
    "sgm.modules.diffusionmodules.sampling.VPODEDPMPP2MSampler": "sat.diffusion.samplers.VPODEDPMPP2MSampler",
    "sgm.modules.diffusionmodules.sampling.VideoDDIMSampler": "sat.diffusion.samplers.VideoDDIMSampler",
    "sgm.modules.diffusionmodules.sampling.ZeroSNRDDIMSampler": "sat.diffusion.samplers.VideoDDIMSampler",
    "sgm.modules.diffusionmodules.sampling.Image2VideoDDIMSampler": "sat.diffusion.samplers.VideoDDIMSampler",
    "sgm.modules.diffusionmodules.sampling.DPMPP2MSampler": "sat.diffusion.samplers.VPODEDPMPP2MSampler",
    "sgm.modules.diffusionmodules.sampling.SDEDPMPP2MSampler": "sat.diffusion.samplers.VPSDEDPMPP2MSampler",
    "sgm.modules.diffusionmodules.sampling.EulerEDMSampler": "sat.diffusion.edm_samplers.EulerEDMSampler",
    "sgm.modules.diffusionmodules.sampling.HeunEDMSampler": "sat.diffusion.edm_samplers.HeunEDMSampler",
    "sgm.modules.diffusionmodules.sampling.EulerAncestralSampler": "sat.diffusion.edm_samplers.EulerAncestralSampler",
    "sgm.modules.diffusionmodules.sampling.VideoDDPMSampler": "sat.diffusion.edm_samplers.EulerAncestralSampler",
    "sgm.modules.diffusionmodules.sampling.DPMPP2SAncestralSampler": (
        "sat.diffusion.edm_samplers.DPMPP2SAncestralSampler"
    ),
    # text
    "sgm.modules.GeneralConditioner": "sat.conditioning.text.GeneralConditioner",
    "sgm.modules.encoders.modules.FrozenT5Embedder": "sat.conditioning.text.FrozenT5Embedder",
    "sgm.modules.encoders.modules.ConcatTimestepEmbedderND": "sat.conditioning.size.SizeEmbedder",
    # pixels <-> latents
    "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper": "sat.vae.autoencoder.VideoAutoencoder",
    "vae_modules.autoencoder.VideoAutoencodingEngine": "sat.vae.autoencoder.VideoAutoencoder",
    "vae_modules.regularizers.DiagonalGaussianRegularizer": "sat.vae.autoencoder.DiagonalGaussianRegularizer",
    "vae_modules.cp_enc_dec.ContextParallelEncoder3D": "sat.vae.encoder.Encoder3D",
    "vae_modules.cp_enc_dec.ContextParallelDecoder3D": "sat.vae.decoder.Decoder3D",
    # data, optimizer, adapters
    "data_video.SFTDataset": "sat.data.dataset.SFTDataset",
    "sat.ops.FusedEmaAdam": "sat.ops.adam.FusedEmaAdam",
    "sat.model.finetune.lora2.LoraMixin": "sat.model.finetune.lora2.LoraMixin",
}
"""Released `target:` string -> the class of this project that takes its parameters."""

RELEASED_MODULES = ("dit_video_concat.", "diffusion_video.", "sgm.", "vae_modules.", "data_video.")
"""Modules that exist only in the released code base: a name in them that TARGETS lacks cannot be imported."""

_VAE_HALF = {
    "resolution": "the network is convolutional and takes any size",
    "attn_resolutions": "the released models have no attention in the VAE",
    "give_pre_end": "the last convolution is always applied",
    "pad_mode": "time is always padded with the first frame, space with zeros",
    "use_cp": "context parallelism is chosen by args.context_parallel_size",
    "gather_norm": "norms see the whole clip, whether or not processes share it",
}

INEFFECTIVE = {
    "sat.cogvideox.transformer.DiffusionTransformer": {
        "parallel_output": "the final layer is the same on every tensor-parallel rank",
        "zero_init_y_embed": "the key was dropped after release 1.0",
    },
    "sat.vae.encoder.Encoder3D": {**_VAE_HALF, "out_ch": "the encoder gives latents; pixels are the decoder's"},
    "sat.vae.decoder.Decoder3D": {
        **_VAE_HALF,
        "double_z": "only the encoder's output has two halves",
        "in_channels": "the decoder takes latents, of z_channels",
    },
    "sat.cogview3.transformer.CogView3PlusTransformer": {
        "text_length": "the text states' own length counts",
        "block_size": "the token grid follows from the latents and patch_size",
        "layernorm_order": "set transformer_args.layernorm_order",
    },
    "sat.cogview3.mixins.PositionEmbeddingMixin": {
        "max_length": "max_height and max_width say how far the table reaches",
        "text_length": "the text states' own length counts",
        "block_size": "the token grid follows from the latents and patch_size",
    },
    "sat.diffusion.samplers.VPSDEDPMPP2MSampler": {
        "verbose": "progress is shown by the script",
        "device": "the sampler runs where its input is",
    },
    "sat.diffusion.scaling.DiscreteDenoiser": {
        "quantize_c_noise": "the network is given the timestep itself, which is whole already",
    },
    "sat.diffusion.loss.VideoDiffusionLoss": {
        "fixed_frames": "the released loss reads it nowhere; give the sampler fixed_frames",
    },
    "sat.cogvideox.engine.VideoDiffusionEngine": {
        "log_keys": "what is logged stands in metrics.jsonl",
        "disable_first_stage_autocast": "there is no autocast: every part runs in its own precision",
        "augmentation_dropout": "the released code reads it nowhere",
    },
}
"""Class of this project -> released parameters that have no effect here, each with the reason given to the user."""
for _sampler in (
    "samplers.VPODEDPMPP2MSampler",
    "edm_samplers.EulerEDMSampler",
    "edm_samplers.HeunEDMSampler",
    "edm_samplers.EulerAncestralSampler",
    "edm_samplers.DPMPP2SAncestralSampler",
):
    INEFFECTIVE[f"sat.diffusion.{_sampler}"] = INEFFECTIVE["sat.diffusion.samplers.VPSDEDPMPP2MSampler"]
INEFFECTIVE["sat.diffusion.samplers.VideoDDIMSampler"] = {
    **INEFFECTIVE["sat.diffusion.samplers.VPSDEDPMPP2MSampler"],
    "do_cfg": "choose the guider: VanillaCFG, DynamicCFG, or IdentityGuider for none",
}

INEFFECTIVE_ARGS = {
    "no_load_rng": "randomness is a function of the seed and the sample, no state needs loading",
    "no_save_rng": "randomness is a function of the seed and the sample, no state needs saving",
    "only_log_video_latents": "validation samples videos where args.log_sample asks for them",
    "log_image": "validation samples videos where args.log_sample asks for them",
    "force_pretrain": "mode: pretrain says the same",
    "device": "the device is cuda where there is one, else cpu",
    "debug": "set the environment variable SAT_LOGLEVEL=DEBUG",
    "distributed_backend": "nccl on GPUs, gloo on CPUs",
    "split": "name train_data and valid_data instead",
    "block_size": "data order is one permutation per epoch",
    "prefetch_factor": "two batches per worker are prefetched",
    "iterable_dataset": "data are read by index",
    "strict_eval": "validation always runs over its whole fixed set",
    "grid_num_rows": "each sample is a file of its own",
    "lcm_steps": "set the sampler's num_steps",
    "final_size": "set sampling_image_size",
    "sampling_fps_control": "set sampling_fps",
    "profiling": "not supported yet",
    "exit_interval": "set train_iters",
    "save_args": "training_config.yaml is always written",
    "resume_dataloader": "the data position is always restored",
}
"""Released keys of the `args:` section that have no effect here, each with the reason given to the user."""

LEGACY_CLASSES = frozenset(
    {
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "argparse.Namespace",
        "collections.OrderedDict",
    }
)
"""Classes that checkpoints of SAT and DeepSpeed hold beside tensors. A file that asks for any other is refused."""
