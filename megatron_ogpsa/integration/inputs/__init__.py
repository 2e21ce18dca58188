"""From data sets to the model: sampling, micro-batches, sequences packed or split, the forward step."""
