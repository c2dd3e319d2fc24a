"""Files on disk to samples: list clips, decode, choose frames, resize, order, batch.

- manifest: a folder, a JSONL file or tar shards -> ClipIndex, which clips there are, kept and dropped
- clip, shards, remote: where a clip is: a file, a member of a tar file, a part of a file behind HTTP
- video: read and write video files (needs PyAV: the `video` extra)
- frames: which frames of a clip are used, and their size
- dataset: SFTDataset and LatentShards, clip number -> pixels or latents and caption
- mixture: several datasets in one run, by weights
- quarantine: clips that cannot be used are replaced, counted, reported
- sampler: which sample comes when, a function of the seed and the step alone
- packing: which clips share a row
- loader, handover: samples -> batches, in worker processes, and the memory in which they come over
- content, cache: what encoders made of clips and captions, kept by the hash of what it was made of
- synthetic: latents drawn from the sample number, no file needed
"""
