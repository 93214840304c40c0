"""Change β1, μ and the learning rate during a training, beside torch's schedulers."""
