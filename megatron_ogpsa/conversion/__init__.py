"""Hugging Face folders and Megatron's distributed checkpoints, one into the other, a tensor at a time.

* :mod:`.families` is all that is known about architectures: ``config.json`` as Megatron's flags, and names.
* :mod:`.model` says which Hugging Face tensors each piece of a checkpoint is made of, from Megatron's own model.
* :mod:`.huggingface` reads a Hugging Face folder, :mod:`.safetensors_writer` writes its weights.
* :mod:`.chat` is how an exported model is talked to; :mod:`.model_file` is what a configuration's ``model`` stands for.
* :mod:`.checkpoint_writer` and :mod:`.checkpoint_reader` are Megatron's side of it.
* :mod:`.convert` puts them together, in both directions.
"""
