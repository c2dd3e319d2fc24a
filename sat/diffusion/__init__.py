"""The mathematics of diffusion: schedules, scaling, loss, guidance, samplers. It knows no network and no rank.

A noise level is written `alpha`: the root of the cumulative signal variance, 1 for clean and 0 for pure noise, so that
noisy = alpha · clean + √(1 - alpha²) · noise.
"""
