"""From files on disk to batches: index, video decoding, control signals, buckets, data sets, latent cache."""
