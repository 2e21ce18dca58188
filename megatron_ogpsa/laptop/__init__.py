"""A small instruct model from a Hugging Face folder through SFT→DPO with OGPSA and back, on a CPU.

* :mod:`.safety_data` is a small hand-written safety set: unsafe requests with refusals, and harmless look-alikes.
* :mod:`.recipe` writes the files and the configuration, :mod:`.run` takes the steps, behind the verb ``laptop``.
* :mod:`.chat` asks a Hugging Face folder a few questions.
* :mod:`.gguf` makes a Hugging Face folder of a GGUF file.
"""
