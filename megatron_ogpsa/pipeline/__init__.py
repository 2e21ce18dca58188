"""Several stages as one job, such as SFT→DPO: each begins with the weights that the one before it has saved.

* :mod:`.plan` makes a configuration with ``stages`` into one run of Megatron for each stage.
* :mod:`.progress` knows from the stages' folders what is finished, what goes on, and what does not fit together.
* :mod:`.ranks` runs the stages one after the other within one torchrun job.
"""
