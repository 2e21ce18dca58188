"""From data sets to the model: sampling, micro-batches, sequences split, the forward step."""
