"""Runs on one node or many: where nodes meet, how ranks are started, watched, restarted and ended.

* :mod:`.settings` makes flags, a configuration's ``launch`` and the environment into :class:`LaunchSettings`. Pure.
* :mod:`.slurm` reads what SLURM says of a job step. Pure.
* :mod:`.meant` refuses to be a rank where ranks were to be started.
* :mod:`.restarts` refuses restarts that would begin anew.
* :mod:`.agent` is torchrun's agent with what training needs beyond it.
* :mod:`.failures` says which rank failed first, and with what words; :mod:`.thawing` lets frozen ranks end.
* :mod:`.node` runs the agent of this node and says in one line how it went.
"""
