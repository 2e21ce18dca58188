"""The command ``megatron-ogpsa``: one module for each verb, registered in :mod:`.main`."""
