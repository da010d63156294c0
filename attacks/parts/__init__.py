"""What several attacks share: networks, priors, the training loop, the inference of states."""
