"""Scores of a Megatron checkpoint: losses on named data sets, and how often prompts are refused.

* :mod:`.losses` is the loss of a data set by forward-only passes, each sample counted once in any layout.
* :mod:`.generation` answers prompts greedily, with Megatron's cache of keys and values.
* :mod:`.refusals` tells a refusal by patterns, :mod:`.judges` by a function of the user's.
* :mod:`.request` is what is to be scored, :mod:`.scoring` does it, :mod:`.report` prints it.
"""
