"""The reference policy of DPO without a second model: log-probabilities of every answer, computed once, before training.

* :mod:`.weights` says which weights the model has.
* :mod:`.store` is the file that the log-probabilities are kept in.
* :mod:`.passes` computes them with forward-only passes through Megatron's schedules.
"""
