"""Words and pictures to ids and pixels: one path for training, evaluation and serving."""
